"""Overrides of the plan from optim_args: a JSON or YAML file, or one at a time; and what is refused, in which words."""

import json

import pytest
from transformers import HfArgumentParser, Trainer, TrainingArguments

from normuon_plugins.hf_trainer import register_normuon, unregister_normuon
from tests.adapters.trainer_runs import gpt2
from tests.adapters.training import trainer_arguments
from tests.models import tiny_llama


@pytest.fixture(autouse=True)
def _registered(tmp_path, monkeypatch):
    register_normuon()
    monkeypatch.chdir(tmp_path)
    yield
    unregister_normuon()


def planned(optim_args, model=None):
    """Return name -> layout (None: AdamW) of the optimizer that the Trainer builds."""
    arguments = trainer_arguments("out", optim_args=optim_args)
    optimizer = Trainer(model=model or tiny_llama(), args=arguments).create_optimizer()
    return {name: group.get("layout") for group in optimizer.param_groups for name in group["param_names"]}


def changed(optim_args, model=None):
    """Return the part of the plan that is not as without overrides."""
    usual = planned(None, model)
    return {name: layout for name, layout in planned(optim_args, model).items() if layout != usual[name]}


DOWN = {f"model.layers.{layer}.mlp.down_proj.weight": None for layer in (0, 1)}
HEAD = {"lm_head.weight": "o i"}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("plan.json", json.dumps({r"\.down_proj\.": "adamw", "^lm_head": "o i"})),
        ("plan.yaml", "\\.down_proj\\.: adamw\n^lm_head: o i  # a comment\n"),
        ("plan.yml", json.dumps({r"\.down_proj\.": "adamw", "^lm_head": "normuon"})),
    ],
)
def test_a_file_maps_expressions_to_targets(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert changed(f"overrides={name}") == {**DOWN, **HEAD}


def test_a_layout_with_spaces_and_equal_signs_goes_in_by_a_file(tmp_path):
    (tmp_path / "plan.yaml").write_text("c_attn.weight: i o=24+24\n")
    assert changed("overrides=plan.yaml", gpt2()) == {"transformer.h.0.attn.c_attn.weight": "i o=24+24"}


def test_a_single_override_may_be_repeated():
    assert changed(r"override=\.down_proj\.:adamw,beta2=0.9,override=^lm_head:normuon") == {**DOWN, **HEAD}


def test_the_last_colon_divides_expression_and_target():
    assert changed(r"override=(?:down_proj):adamw") == DOWN


def test_a_file_and_a_single_override_add_up(tmp_path):
    (tmp_path / "plan.json").write_text('{"down_proj": "adamw"}')
    assert changed("overrides=plan.json,override=^lm_head:normuon") == {**DOWN, **HEAD}


def test_overrides_arrive_from_the_command_line(tmp_path):
    (tmp_path / "plan.json").write_text('{"down_proj": "adamw"}')
    line = ["--output_dir", "out", "--optim", "normuon", "--optim_args", "overrides=plan.json", "--use_cpu"]
    line += ["--learning_rate", "1e-3", "--report_to", "none"]
    (arguments,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(line)
    _, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    assert options["overrides"] == {"down_proj": "adamw"}


FILES = {
    "typo.yaml": "down_proj: adamv\n",
    "truth.yaml": "down_proj: no\n",
    "number.yaml": "0: adamw\n",
    "regex.yaml": "down_proj(: adamw\n",
    "list.json": '["down_proj"]',
    "empty.yaml": "",
    "broken.json": '{"down\\.proj": "adamw"}',
    "broken.yaml": "down_proj: [adamw\n",
    "plan.txt": "down_proj: adamw",
    "other.json": '{"down_proj": "adamw"}',
}


@pytest.mark.parametrize(
    ("optim_args", "message"),
    [
        ("overrides=missing.json", r"overrides=missing\.json': .*missing\.json cannot be read \(No such file"),
        ("overrides=plan.txt", r"overrides=plan\.txt' must name a file that ends in one of \['\.json'"),
        ("overrides=typo.yaml", r"typo\.yaml: the value of 'down_proj' is 'adamv', and must be 'normuon', 'adamw' or"),
        ("overrides=truth.yaml", r"truth\.yaml: the value of 'down_proj' is False, and must be 'normuon', 'adamw' or"),
        ("overrides=number.yaml", r"number\.yaml: key 0 must be a regular expression"),
        ("overrides=regex.yaml", r"regex\.yaml: key 'down_proj\(' must be a regular expression: missing \)"),
        ("overrides=list.json", r"list\.json must map regular expressions to .*; it holds \['down_proj'\]"),
        ("overrides=empty.yaml", r"empty\.yaml must map regular expressions to .*; it holds None"),
        ("overrides=broken.json", r"broken\.json is not JSON: Invalid \\escape.*a backslash is written twice"),
        ("overrides=broken.yaml", r"broken\.yaml is not YAML: "),
        ("override=down_proj", r"override=down_proj' must be override=REGEX:TARGET"),
        ("override=down_proj:adamv", r"the target of 'down_proj' is 'adamv', and must be 'normuon' or 'adamw'"),
        (
            "override=c_attn:o i",
            r"the target of 'c_attn' is 'oi', .* a layout goes into a file: optim_args='overrides=",
        ),
        ("override=down_proj(:adamw", r"key 'down_proj\(' must be a regular expression"),
        ("overrides=other.json,override=down_proj:normuon", r"'down_proj' is overridden to 'normuon', and to 'adamw'"),
        ("overrides=other.json,overrides=list.json", r"\['overrides'\] more than once; only override=REGEX:TARGET"),
        ("override=down_porj:adamw", r"override 'down_porj' matches no trainable parameter; the names begin"),
    ],
)
def test_what_cannot_be_is_refused_with_the_remedy(tmp_path, optim_args, message):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        planned(optim_args)
