"""The names and option names that others write against; changing one is a breaking change."""

import inspect

import torch

import normuon_plugins
from normuon_plugins import NorMuon, build_normuon, clip_grad_norm_, plan_parameters
from normuon_plugins.accelerate import prepare_normuon
from normuon_plugins.hf_trainer import register_normuon, unregister_normuon
from normuon_plugins.lightning import configure_normuon, setup_normuon


def names(function):
    return list(inspect.signature(function).parameters)


def test_top_level_names():
    assert sorted(normuon_plugins.__all__) == [
        "ExchangeReport",
        "NorMuon",
        "ParameterPlan",
        "add_parameters",
        "build_normuon",
        "clip_grad_norm_",
        "plan_exchange",
        "plan_parameters",
    ]


def test_options_of_torch_muon_keep_their_names_and_order():
    assert names(NorMuon)[: len(names(torch.optim.Muon))] == names(torch.optim.Muon)


def test_our_options():
    assert names(NorMuon)[len(names(torch.optim.Muon)) :] == [
        "beta2",
        "normalize_neurons",
        "adamw_lr",
        "adamw_betas",
        "adamw_eps",
        "adamw_weight_decay",
        "ns_dtype",
        "momentum_dtype",
        "kahan_sum",
        "nonfinite",
        "bucket_bytes",
        "orthogonalize_fn",
        "compile",
        "replicas",
        "process_group",
    ]


def test_defaults_of_the_paper():
    defaults = {name: p.default for name, p in inspect.signature(NorMuon).parameters.items()}
    expected = {"lr": 1e-3, "momentum": 0.95, "beta2": 0.95, "weight_decay": 0.1, "nesterov": True, "ns_steps": 5}
    expected |= {"eps": 1e-8, "adjust_lr_fn": "match_rms_adamw", "ns_coefficients": "muon", "normalize_neurons": True}
    expected |= {"adamw_betas": (0.9, 0.95), "adamw_eps": 1e-8, "adamw_weight_decay": 0.0, "adamw_lr": None}
    assert {name: defaults[name] for name in expected} == expected


def test_signatures_of_the_doors():
    options = ["overrides", "lora", "split_fused", "per_head", "strict", "include_frozen", "allow_no_matrix"]
    assert names(plan_parameters) == ["model", *options]
    assert names(build_normuon) == ["model", "options"]
    assert names(configure_normuon) == ["module", "scheduler", "warmup", "options"]
    assert names(prepare_normuon) == ["accelerator", "model", "others", "options"]
    assert names(setup_normuon) == ["fabric", "model", "options"]
    assert names(clip_grad_norm_)[:4] == names(torch.nn.utils.clip_grad_norm_)[:4]
    assert names(NorMuon.metrics) == ["self", "synchronize"]
    assert names(register_normuon) == names(unregister_normuon) == []
