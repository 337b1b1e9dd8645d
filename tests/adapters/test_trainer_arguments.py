"""TrainingArguments(optim="normuon"): registration, translation of arguments, pickles, resume."""

import json
import pickle
import subprocess
import sys

import pytest
import torch
from transformers import HfArgumentParser, Seq2SeqTrainingArguments, Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from normuon_plugins import NorMuon
from normuon_plugins.hf_trainer import NorMuonFactory, register_normuon, unregister_normuon
from tests.adapters.training import examples, trainer_arguments, weights
from tests.models import max_difference, tiny_llama


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


def test_every_scalar_option_can_be_written_in_optim_args(tmp_path):
    text = (
        "momentum=0.9,nesterov=True,ns_coefficients=polar_express,eps=1e-9,ns_steps=4,adjust_lr_fn=original,beta2=0.9,"
        "normalize_neurons=false,adamw_lr=none,adamw_betas=0.8:0.9,adamw_eps=1e-7,adamw_weight_decay=0.1,"
        "ns_dtype=float32,nonfinite=raise,bucket_bytes=1000000,lora=b"
    )
    optimizer = optimizer_for(trainer_arguments(tmp_path, optim_args=text))
    expected = {"momentum": 0.9, "nesterov": True, "ns_coefficients": "polar_express", "eps": 1e-9, "ns_steps": 4}
    expected |= {"adjust_lr_fn": "original", "beta2": 0.9, "normalize_neurons": False, "ns_dtype": "float32"}
    assert expected.items() <= optimizer.param_groups[0].items()
    assert optimizer.param_groups[1]["betas"] == (0.8, 0.9)
    assert optimizer.defaults["nonfinite"] == "raise"
    triple = optimizer_for(trainer_arguments(tmp_path, optim_args="ns_coefficients=3.4:-4.7:2.0"))
    assert triple.param_groups[0]["ns_coefficients"] == (3.4, -4.7, 2.0)


@pytest.mark.parametrize("key", ["momentun", "lr", "overrides", "orthogonalize_fn"])
def test_a_typo_in_optim_args_names_the_known_keys(tmp_path, key):
    with pytest.raises(ValueError, match=rf"unknown keys \['{key}'\]; known are \['adamw_betas', .*'momentum'"):
        optimizer_for(trainer_arguments(tmp_path, optim_args=f"{key}=0.9"))


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


def test_resume_equals_the_uninterrupted_run(tmp_path):
    def run(folder, seed, **changes):
        arguments = trainer_arguments(folder, save_strategy="steps", save_steps=3, train_sampling_strategy="random")
        model = tiny_llama(seed)
        trainer = Trainer(model=model, args=arguments, train_dataset=examples())
        trainer.train(**changes)
        return weights(model)

    whole = run(tmp_path, seed=0)
    resumed = run(tmp_path, seed=7, resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert max_difference(resumed, whole) == 0


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


def test_logged_learning_rate_is_that_of_the_matrices(tmp_path):
    trainer = Trainer(model=tiny_llama(), args=trainer_arguments(tmp_path), train_dataset=examples())
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert max(rates) == pytest.approx(0.01)
