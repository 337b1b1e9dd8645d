"""TRL's trainers with optim="normuon": the plan, what moves, resume, two processes, recipes, configuration files."""

import ast
import functools
import re
import sys
from pathlib import Path

import datasets
import pytest
import torch
import trl
from transformers import Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, TrlParser

from normuon_plugins import NorMuon, build_normuon
from normuon_plugins.hf_trainer import NorMuonFactory, NorMuonMetrics, register_normuon, unregister_normuon
from normuon_plugins.hf_trainer.__main__ import main
from tests import documentation
from tests.adapters.training import weights
from tests.adapters.trl_runs import (
    FLOAT64,
    HIDDEN,
    SAVED_AT,
    documented_files,
    lora,
    make_trainer,
    names_by_algorithm,
    options,
    preference_dataset,
    reward_model,
    text_dataset,
    trained,
    two_processes,
    word_tokenizer,
)
from tests.models import max_difference, tiny_llama
from tests.ranks import run_ranks

KINDS = ("sft", "dpo", "grpo", "reward")
PAGE = "docs/trl.md"

pytestmark = [
    # trl 1.16 calls transformers 5.23 by the old names
    pytest.mark.filterwarnings(r"ignore:`\w*gradient_checkpointing\w*` is deprecated:FutureWarning"),
]


@pytest.fixture(autouse=True, scope="module")
def _registered():
    register_normuon()
    yield
    unregister_normuon()


@pytest.fixture
def unregistered():
    unregister_normuon()
    yield
    register_normuon()


@pytest.fixture(scope="module", params=KINDS)
def run(request, tmp_path_factory):
    """A finished run, what moved in it, and the weights after it was resumed in the middle by another trainer.

    The second begins with other weights: only a checkpoint can bring it where the first one came.
    """
    kind, folder = request.param, tmp_path_factory.mktemp(request.param)
    saving = {"save_strategy": "steps", "save_steps": SAVED_AT}
    trainer = make_trainer(kind, folder, changes=saving)
    moved = trained(trainer)
    other = reward_model(seed=7) if kind == "reward" else tiny_llama(seed=7)
    resumed = make_trainer(kind, folder, other, changes=saving)
    trained(resumed, resume=folder / f"checkpoint-{SAVED_AT}")
    return {"kind": kind, "trainer": trainer, "moved": moved, "resumed": weights(resumed.model)}


def test_the_hidden_matrices_are_on_normuon_and_the_rest_is_on_adamw(run):
    optimizer = run["trainer"].optimizer.optimizer
    assert isinstance(optimizer, NorMuon)
    names = set(weights(run["trainer"].model))
    hidden = {name for name in names if any(part in name for part in HIDDEN)}
    assert len(hidden) == 14
    assert names_by_algorithm(optimizer) == {"normuon": hidden, "adamw": names - hidden}


def test_every_weight_moves(run):
    assert run["moved"] == set(weights(run["trainer"].model))


def test_resumed_run_equals_the_uninterrupted_one(run):
    assert max_difference(run["resumed"], weights(run["trainer"].model)) == 0


def test_the_head_of_a_reward_model_is_on_adamw(tmp_path):
    optimizer = make_trainer("reward", tmp_path).create_optimizer()
    assert "score.weight" in names_by_algorithm(optimizer)["adamw"]


@pytest.mark.parametrize("kind", ["kto", "rloo", "distillation"])
def test_the_other_stable_trainers_train_with_normuon(tmp_path, kind):
    trainer = make_trainer(kind, tmp_path, changes={"max_steps": 2})
    assert len(trained(trainer)) == 21
    assert isinstance(trainer.optimizer.optimizer, NorMuon)


def test_sft_trains_as_the_trainer_of_transformers_does_on_the_same_tokens(tmp_path):
    sft = make_trainer("sft", tmp_path, tiny_llama().double(), changes=FLOAT64)
    trained(sft)
    tokenizer = word_tokenizer()
    rows = [torch.tensor([*tokenizer(text)["input_ids"], tokenizer.eos_token_id]) for text in text_dataset()["text"]]
    data = [{"input_ids": row, "labels": row} for row in rows]
    plain = Trainer(tiny_llama().double(), TrainingArguments(**options(tmp_path, **FLOAT64)), train_dataset=data)
    trained(plain)
    # TRL computes the log-probabilities of the head in float32
    assert max_difference(weights(sft.model), weights(plain.model)) < 1e-6


@pytest.mark.parametrize("rule", ["match_rms_adamw", "match_progress_adamw"])
def test_steps_whose_rewards_are_equal_move_matrices_of_fixed_size_on_and_let_the_others_rest(tmp_path, rule):
    calls = []

    def teaches_in_the_first_two_steps(completions, **_):
        calls.append(len(completions))
        return [float(index * (len(calls) <= 2)) for index in range(len(completions))]

    changes = {
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_steps": 8,
        "optim_args": f"adjust_lr_fn={rule}",
    }
    trainer = make_trainer("grpo", tmp_path, changes=changes, reward_funcs=teaches_in_the_first_two_steps)
    trainer.add_callback(NorMuonMetrics(trainer))
    trained(trainer)
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert [norm > 0 for norm in norms] == [True] * 2 + [False] * 6
    sizes = [e["normuon/update_rms"] for e in trainer.state.log_history if "normuon/update_rms" in e]
    if rule == "match_rms_adamw":
        assert sizes[-1] == pytest.approx(sizes[1], rel=0.02)
    else:  # the momentum falls to 0.95 of itself at each of six steps
        assert sizes[-1] < 0.85 * sizes[1]


# LoRA


@pytest.mark.parametrize(
    ("policy", "expected"),
    [("normuon", {"lora_A": "normuon", "lora_B": "normuon"}), ("b", {"lora_A": "adamw", "lora_B": "normuon"})],
)
def test_peft_config_with_a_lora_policy(tmp_path, policy, expected):
    trainer = make_trainer("sft", tmp_path, changes={"optim_args": f"lora={policy}"}, peft_config=lora())
    moved = trained(trainer)
    assert moved == {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    found = names_by_algorithm(trainer.optimizer.optimizer)
    assert {(name.split(".")[-3], algorithm) for algorithm in found for name in found[algorithm]} == set(
        expected.items()
    )


def test_peft_config_alone_warns_that_nothing_is_on_normuon(tmp_path):
    trainer = make_trainer("dpo", tmp_path, peft_config=lora())
    with pytest.warns(UserWarning, match=r"nothing is on NorMuon\. lora='normuon' or lora='b'"):
        trained(trainer)


# Two processes


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks(two_processes, 2, str(tmp_path_factory.mktemp("ranks")))


@pytest.mark.parametrize("case", ["sft", "lora", "dpo", "grpo"])
def test_two_processes_share_the_matrices_and_have_equal_weights(ranks, case):
    first, second = (seen[case] for seen in ranks)
    assert first["shares work"]
    assert second["shares work"]
    assert max_difference(first["weights"], second["weights"]) == 0
    assert len(first["moved"]) == (8 if case == "lora" else 21)


@pytest.mark.parametrize(
    ("case", "changes", "arguments"),
    [("sft", {}, {}), ("lora", {"optim_args": FLOAT64["optim_args"] + ",lora=normuon"}, {"peft_config": lora()})],
)
def test_two_processes_train_as_one_does(ranks, tmp_path, case, changes, arguments):
    trainer = make_trainer("sft", tmp_path, tiny_llama().double(), changes=FLOAT64 | changes, **arguments)
    trained(trainer)
    assert max_difference(ranks[0][case]["weights"], weights(trainer.model)) < 1e-6


def test_two_processes_resume_lora_where_it_stopped(ranks):
    assert [seen["lora"]["resumed"] for seen in ranks] == [0, 0]


# Options that no string can hold, and trainers without the argument for them


def test_recipe_without_registration(tmp_path, unregistered):
    trainer = make_trainer("dpo", tmp_path, changes={"optim": "adamw_torch"})
    trainer.optimizer_cls_and_kwargs = (
        NorMuonFactory,
        {"lr": 3e-4, "weight_decay": 0.1, "overrides": {r"\.o_proj\.": "adamw"}},
    )
    assert len(trained(trainer)) == 21
    optimizer = trainer.optimizer.optimizer
    assert isinstance(optimizer, NorMuon)
    assert sum(".o_proj." in name for name in names_by_algorithm(optimizer)["adamw"]) == 2
    assert {group["initial_lr"] for group in optimizer.param_groups} == {3e-4}


def test_recipe_with_registration_keeps_the_fields_of_the_config(tmp_path):
    trainer = make_trainer("grpo", tmp_path, changes={"optim_args": "adamw_lr=0.003"})
    factory, chosen = trainer.get_optimizer_cls_and_kwargs(trainer.args)
    trainer.optimizer_cls_and_kwargs = factory, chosen | {"orthogonalize_fn": torch.sign}
    assert len(trained(trainer)) == 21
    optimizer = trainer.optimizer.optimizer
    assert optimizer.defaults["orthogonalize_fn"] is torch.sign
    rates = {group["algorithm"]: group["initial_lr"] for group in optimizer.param_groups}
    assert rates == {"normuon": 0.01, "adamw": 0.003}


def test_recipe_for_trainers_that_have_the_argument(tmp_path, unregistered):
    chosen = (NorMuonFactory, {"lr": 0.01, "orthogonalize_fn": torch.sign})
    trainer = make_trainer("sft", tmp_path, changes={"optim": "adamw_torch"}, optimizer_cls_and_kwargs=chosen)
    assert len(trained(trainer)) == 21
    assert trainer.optimizer.optimizer.defaults["orthogonalize_fn"] is torch.sign


@functools.cache
def constructors_of_trl():
    """Return name, arguments and methods of every trainer in trl, also of those that need other packages."""
    found = []
    for path in sorted(Path(trl.__file__).parent.rglob("*_trainer.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and re.fullmatch(r"[A-Z]\w*Trainer", node.name):
                methods = {f.name: f for f in node.body if isinstance(f, ast.FunctionDef)}
                arguments = methods["__init__"].args
                found.append((node.name, {a.arg for a in (*arguments.args, *arguments.kwonlyargs)}, {*methods}))
    return found


def test_the_page_lists_every_trainer_by_whether_it_takes_optimizer_cls_and_kwargs(root):
    found = {"has it": set(), "lacks it": set()}
    for name, arguments, _ in constructors_of_trl():
        found["has it" if "optimizer_cls_and_kwargs" in arguments else "lacks it"].add(name)
    rows = re.findall(r"^\| (has it|lacks it) \| (.+) \|$", (root / PAGE).read_text(), re.MULTILINE)
    assert {which: set(re.findall(r"\w+Trainer", names)) for which, names in rows} == found


def test_no_trainer_of_trl_makes_its_own_optimizer():
    assert not [name for name, _, methods in constructors_of_trl() if "create_optimizer" in methods]


# Configuration


def test_trl_parser_reads_the_command_line(tmp_path):
    words = ["--output_dir", str(tmp_path), "--optim", "normuon", "--optim_args", "beta2=0.9,adamw_lr=1e-4"]
    (config,) = TrlParser([DPOConfig]).parse_args_and_config([*words, "--learning_rate", "3e-4", "--use_cpu"])
    trainer = DPOTrainer(
        tiny_llama(), tiny_llama(), config, train_dataset=preference_dataset(), processing_class=word_tokenizer()
    )
    rates = {g["algorithm"]: (g["lr"], g.get("beta2")) for g in trainer.create_optimizer().param_groups}
    assert rates == {"normuon": (3e-4, 0.9), "adamw": (1e-4, None)}


def test_the_page_s_command_runs_the_script_of_trl_with_the_page_s_yaml(root, tmp_path, monkeypatch, unregistered):
    documented_files(root / PAGE, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(sys, "argv", ["launcher"])  # what main writes there goes with the test
    (words,) = [words for words in documentation.commands(root / PAGE) if words[0] == "python"]
    assert words[1:4] == ["-m", "normuon_plugins.hf_trainer", "-m"]
    main([*words[3:], "--max_steps", "2", "--save_steps", "2", "--use_cpu", "--report_to", "none"])
    state = torch.load(tmp_path / "out" / "checkpoint-2" / "optimizer.pt", weights_only=True)
    rates = {group["algorithm"]: group["initial_lr"] for group in state["param_groups"]}
    assert rates == {"normuon": 3e-4, "adamw": 1e-4}


# Mistakes


def test_without_registration_the_config_names_the_optimizers_it_knows(tmp_path, unregistered):
    with pytest.raises(ValueError, match=r"normuon is not a valid OptimizerNames, please select one of"):
        SFTConfig(**options(tmp_path))


def test_a_typo_in_optim_args_ends_before_the_first_step(tmp_path):
    trainer = make_trainer("sft", tmp_path, changes={"optim_args": "momentun=0.9"})
    with pytest.raises(ValueError, match=r"unknown keys \['momentun'\]; known are"):
        trained(trainer)
    assert trainer.state.global_step == 0


def test_an_override_that_matches_nothing_says_how_the_names_begin_under_the_adapter(tmp_path):
    trainer = make_trainer("dpo", tmp_path, peft_config=lora())
    trainer.optimizer_cls_and_kwargs = (NorMuonFactory, {"lora": "b", "overrides": {r"^model\.layers": "adamw"}})
    with pytest.raises(ValueError, match=r"matches no trainable parameter; the names begin \['base_model\.model"):
        trained(trainer)


def test_an_optimizer_built_before_trl_adds_the_adapter_is_warned_about(tmp_path):
    model = tiny_llama()
    trainer = make_trainer("sft", tmp_path, model, peft_config=lora(), optimizers=(build_normuon(model), None))
    with pytest.warns(UserWarning, match=r"lora_A.* gradients that no group of this optimizer holds"):
        assert not trained(trainer)
