"""TrainingArguments(optim="normuon"): registration, translation of arguments, pickles, resume."""

import inspect
import json
import pickle
import subprocess
import sys

import pytest
import torch
from transformers import HfArgumentParser, Seq2SeqTrainingArguments, Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from normuon_plugins import NorMuon, plan_parameters
from normuon_plugins.hf_trainer import NorMuonFactory, register_normuon, unregister_normuon
from normuon_plugins.hf_trainer.arguments import OPTIM_ARGS
from tests.adapters.trainer_runs import bert, gpt2
from tests.adapters.training import examples, trainer_arguments
from tests.models import tiny_llama


@pytest.fixture(autouse=True)
def _registered():
    register_normuon()
    yield
    unregister_normuon()


def optimizer_for(arguments):
    return Trainer(model=tiny_llama(), args=arguments, train_dataset=examples()).create_optimizer()


def group_values(optimizer, key):
    return {group["name"]: group.get(key) for group in optimizer.param_groups}


def test_registering_twice_and_unregistering_twice():
    members = list(OptimizerNames)
    register_normuon()
    assert list(OptimizerNames) == members
    assert OptimizerNames("normuon") is OptimizerNames["NORMUON"] is OptimizerNames.NORMUON
    for _ in range(2):
        unregister_normuon()
        assert list(OptimizerNames) == members[:-1]
        assert not hasattr(OptimizerNames, "NORMUON")
        with pytest.raises(ValueError, match="normuon is not a valid OptimizerNames"):
            OptimizerNames("normuon")


def test_arguments_reach_the_groups(tmp_path):
    arguments = trainer_arguments(
        tmp_path, learning_rate=0.02, weight_decay=0.3, optim_args="momentum=0.9,adamw_lr=1e-3,adamw_weight_decay=0.2"
    )
    optimizer = optimizer_for(arguments)
    assert isinstance(optimizer, NorMuon)
    assert group_values(optimizer, "lr") == {"normuon_o_i": 0.02, "adamw": 1e-3, "adamw_no_decay": 1e-3}
    assert group_values(optimizer, "weight_decay") == {"normuon_o_i": 0.3, "adamw": 0.2, "adamw_no_decay": 0.0}
    assert optimizer.param_groups[0]["momentum"] == 0.9


def test_adam_fields_reach_adamw_only_where_the_user_changed_them(tmp_path):
    untouched = optimizer_for(trainer_arguments(tmp_path))
    assert untouched.param_groups[1]["betas"] == (0.9, 0.95)  # NorMuon's, not the field's 0.999
    assert untouched.param_groups[1]["eps"] == 1e-8
    changed = optimizer_for(trainer_arguments(tmp_path, adam_beta1=0.8, adam_epsilon=1e-6))
    assert changed.param_groups[1]["betas"] == (0.8, 0.95)
    assert changed.param_groups[1]["eps"] == 1e-6
    both = optimizer_for(trainer_arguments(tmp_path, adam_beta1=0.8, adam_beta2=0.99))
    assert both.param_groups[1]["betas"] == (0.8, 0.99)


def test_the_learning_rate_that_nobody_set_is_told_with_the_remedy(tmp_path):
    arguments = trainer_arguments(tmp_path, learning_rate=TrainingArguments("unset").learning_rate)
    with pytest.warns(UserWarning, match=r"learning_rate=5e-05 is the Trainer's default.*docs/tuning\.md"):
        optimizer = optimizer_for(arguments)
    assert optimizer.param_groups[0]["lr"] == 5e-5


# option -> how it is written, what arrives
WRITTEN = {
    "adamw_betas": ("0.8:0.9", (0.8, 0.9)),
    "adamw_eps": ("1e-7", 1e-7),
    "adamw_lr": ("1e-4", 1e-4),
    "adamw_weight_decay": ("0.1", 0.1),
    "adjust_lr_fn": ("original", "original"),
    "allow_no_matrix": ("true", True),
    "beta2": ("0.9", 0.9),
    "bucket_bytes": ("1000000", 1000000),
    "eps": ("1e-9", 1e-9),
    "include_frozen": ("true", True),
    "kahan_sum": ("true", True),
    "compile": ("true", True),
    "lora": ("b", "b"),
    "momentum": ("0.9", 0.9),
    "momentum_dtype": ("int8", "int8"),
    "nesterov": ("False", False),
    "nonfinite": ("raise", "raise"),
    "normalize_neurons": ("false", False),
    "ns_coefficients": ("3.4:-4.7:2.0", (3.4, -4.7, 2.0)),
    "ns_dtype": ("float32", "float32"),
    "ns_steps": ("4", 4),
    "per_head": ("true", True),
    "replicas": ("redundant", "redundant"),
    "split_fused": ("false", False),
    "strict": ("true", True),
}


@pytest.mark.parametrize("option", OPTIM_ARGS)
def test_every_scalar_option_can_be_written_in_optim_args(tmp_path, option):
    text, value = WRITTEN[option]
    arguments = trainer_arguments(tmp_path, optim_args=f"{option}={text}")
    factory, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    defaults = {**inspect.signature(NorMuon).parameters, **inspect.signature(plan_parameters).parameters}
    assert options[option] == value != defaults[option].default
    optimizer = factory()(tiny_llama(), **options)
    assert optimizer.defaults.get(option, value) == value  # options of the plan are not the optimizer's


def test_only_what_a_string_cannot_hold_is_left_out_of_optim_args():
    every = {*inspect.signature(NorMuon).parameters, *inspect.signature(plan_parameters).parameters}
    assert every - set(OPTIM_ARGS) == {
        *("params", "model"),
        *("lr", "weight_decay"),  # fields of TrainingArguments
        *("overrides", "orthogonalize_fn", "process_group"),
    }


def test_words_of_optim_args_are_read_as_values(tmp_path):
    optimizer = optimizer_for(trainer_arguments(tmp_path, optim_args="adamw_lr=none,ns_coefficients=polar_express"))
    assert group_values(optimizer, "lr") == {"normuon_o_i": 0.01, "adamw": 0.01, "adamw_no_decay": 0.01}
    assert optimizer.param_groups[0]["ns_coefficients"] == "polar_express"


def test_options_of_the_plan_change_the_plan(tmp_path):
    def layouts(optim_args):
        arguments = trainer_arguments(tmp_path, optim_args=optim_args)
        return set(group_values(Trainer(model=gpt2(), args=arguments).create_optimizer(), "layout").values())

    assert layouts(None) == {None, "i o", "i o=16+16+16"}
    assert layouts("split_fused=false") == {None, "i o"}


@pytest.mark.parametrize("key", ["momentun", "lr", "orthogonalize_fn"])
def test_a_typo_in_optim_args_names_the_known_keys(tmp_path, key):
    with pytest.raises(ValueError, match=rf"unknown keys \['{key}'\]; known are \['adamw_betas', .*'momentum'"):
        optimizer_for(trainer_arguments(tmp_path, optim_args=f"{key}=0.9"))


def test_a_key_that_stands_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"optim_args has \['beta2'\] more than once"):
        optimizer_for(trainer_arguments(tmp_path, optim_args="beta2=0.9,momentum=0.9,beta2=0.8"))


@pytest.mark.parametrize("option", ["strict", "split_fused", "nesterov"])
def test_a_word_that_is_neither_true_nor_false_is_refused(tmp_path, option):
    with pytest.raises(ValueError, match=f"{option}='flase' must be True or False"):
        optimizer_for(trainer_arguments(tmp_path, optim_args=f"{option}=flase"))


def test_a_value_out_of_range_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"momentum='0\.9\.1' must be a number"):
        optimizer_for(trainer_arguments(tmp_path, optim_args="momentum=0.9.1"))


@pytest.mark.parametrize("kind", [TrainingArguments, Seq2SeqTrainingArguments])
def test_command_line_json_and_pickle(tmp_path, kind):
    line = ["--output_dir", str(tmp_path), "--optim", "normuon", "--optim_args", "beta2=0.9", "--use_cpu"]
    (arguments,) = HfArgumentParser(kind).parse_args_into_dataclasses(line)
    assert arguments.optim is OptimizerNames("normuon")
    assert json.loads(arguments.to_json_string())["optim"] == "normuon"
    assert pickle.loads(pickle.dumps(arguments)).optim is OptimizerNames("normuon")


def test_training_args_bin_loads_in_a_process_that_never_imported_us(tmp_path):
    torch.save(trainer_arguments(tmp_path), tmp_path / "training_args.bin")
    program = f"""
import sys, torch
arguments = torch.load({str(tmp_path / "training_args.bin")!r}, weights_only=False)
print(arguments.optim.value, arguments.optim_args)
"""
    printed = subprocess.check_output([sys.executable, "-c", program], text=True)
    assert printed.split() == ["normuon", "adamw_lr=0.003,nesterov=true,ns_dtype=float64"]


def test_overrides_go_in_by_the_factory(tmp_path):
    options = {"lr": 0.1, "overrides": {"down_proj": "adamw"}}
    arguments = trainer_arguments(tmp_path, optim="adamw_torch", optim_args=None)
    trainer = Trainer(
        model=tiny_llama(),
        args=arguments,
        train_dataset=examples(),
        optimizer_cls_and_kwargs=(NorMuonFactory, options),
    )
    optimizer = trainer.create_optimizer()
    assert isinstance(optimizer, NorMuon)
    assert "model.layers.0.mlp.down_proj.weight" in optimizer.param_groups[1]["param_names"]


MODELS = {"llama": tiny_llama, "gpt2": gpt2, "bert": bert}


@pytest.mark.parametrize("kind", MODELS)
def test_weight_decay_of_the_trainer_reaches_matrices_alone(tmp_path, kind):
    arguments = trainer_arguments(tmp_path, weight_decay=0.3, optim_args=None)
    optimizer = Trainer(model=MODELS[kind](), args=arguments).create_optimizer()
    decays = {(group["algorithm"], group["weight_decay"]) for group in optimizer.param_groups}
    assert decays == {("normuon", 0.3), ("adamw", 0.0)}


@pytest.mark.parametrize("kind", MODELS)
def test_with_both_decays_the_parameters_that_decay_are_those_of_adamw_torch(tmp_path, kind):
    """Biases and norms never do, embeddings and heads then do."""
    model = MODELS[kind]()
    ours = trainer_arguments(tmp_path, weight_decay=0.3, optim_args="adamw_weight_decay=0.3")
    theirs = trainer_arguments(tmp_path, weight_decay=0.3, optim_args=None, optim="adamw_torch")
    decaying = [
        {id(p) for group in optimizer.param_groups if group["weight_decay"] == 0.3 for p in group["params"]}
        for optimizer in (Trainer(model=model, args=args).create_optimizer() for args in (ours, theirs))
    ]
    assert decaying[0] == decaying[1]
    assert 0 < len(decaying[0]) < len(list(model.parameters()))
