"""Who is measured: our variants, torch's optimizers, and every public implementation that can be imported."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from normuon_plugins import NorMuon

Build = Callable[[list[nn.Parameter], float, float], Optimizer]

MOMENTUM = 0.95
BETA2 = 0.95
# Of all that orthogonalize: dion and HeavyBall know no other number.
NS_STEPS = 5


@dataclass(frozen=True)
class Contender:
    """An optimizer under measurement.

    Attributes:
        name: Unique, as printed.
        build: From parameters, learning rate and weight decay to an optimizer of these.
        module: What must be importable.
        ours: Whether it is a variant of ours.
        orthogonalizes: Whether it is in the comparison of Newton-Schulz.
        takes_stacks: Whether ``(experts, rows, cols)`` is a stack of matrices to it; else it gets them one by one.
        dtype: Dtype of parameters that it insists on; None takes any.
        ns_coefficients: Of a variant of ours.
        note: In what its conditions differ from the others', for the table.
    """

    name: str
    build: Build
    module: str = "torch"
    ours: bool = False
    orthogonalizes: bool = True
    takes_stacks: bool = False
    dtype: torch.dtype | None = None
    ns_coefficients: str = "muon"
    note: str = ""

    @property
    def is_absent(self) -> bool:
        """Whether its module cannot be found."""
        return find_spec(self.module) is None


@dataclass(frozen=True)
class _Ours:
    """Builds a variant of NorMuon."""

    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, parameters: list[nn.Parameter], lr: float, weight_decay: float) -> Optimizer:
        groups: dict[str, list[nn.Parameter]] = {}
        for parameter in parameters:
            groups.setdefault("e o i" if parameter.ndim == 3 else "o i", []).append(parameter)
        described = [{"params": members, "layout": layout} for layout, members in groups.items()]
        options = {"nesterov": False, "beta2": BETA2, "ns_steps": NS_STEPS, **self.options}
        return NorMuon(described, lr, weight_decay, MOMENTUM, **options)


def _torch_muon(parameters: list[nn.Parameter], lr: float, weight_decay: float) -> Optimizer:
    return torch.optim.Muon(
        parameters, lr, weight_decay, MOMENTUM, nesterov=False, ns_steps=NS_STEPS, adjust_lr_fn="match_rms_adamw"
    )


def _torch_adamw(parameters: list[nn.Parameter], lr: float, weight_decay: float) -> Optimizer:
    return torch.optim.AdamW(parameters, lr, (0.9, BETA2), weight_decay=weight_decay, fused=True)


def _import_compiled(module: str) -> Any:
    """Import a peer that compiles one function for every size and for every list of them."""
    torch._dynamo.config.recompile_limit = 64
    return importlib.import_module(module)


def _dion(name: str) -> Build:
    def build(parameters: list[nn.Parameter], lr: float, weight_decay: float) -> Optimizer:
        options: dict[str, Any] = {"mu": MOMENTUM, "weight_decay": weight_decay, "adjust_lr": "rms_norm"}
        # Its kernels for symmetric products are for GPUs.
        options["use_triton"] = parameters[0].is_cuda and find_spec("triton") is not None
        optimizer: Optimizer = getattr(_import_compiled("dion"), name)(parameters, lr=lr, **options)
        return optimizer

    return build


def _authors(parameters: list[nn.Parameter], lr: float, weight_decay: float) -> Optimizer:
    normuon = importlib.import_module("normuon")
    optimizer: Optimizer = normuon.SingleDeviceNorMuon(parameters, lr, weight_decay, MOMENTUM, BETA2)
    return optimizer


def _pytorch_optimizer(parameters: list[nn.Parameter], lr: float, weight_decay: float) -> Optimizer:
    group = {"params": parameters, "use_muon": True}
    module = importlib.import_module("pytorch_optimizer")
    optimizer: Optimizer = module.Muon([group], lr, MOMENTUM, weight_decay, nesterov=False, ns_steps=NS_STEPS)
    return optimizer


def _heavyball(parameters: list[nn.Parameter], lr: float, weight_decay: float) -> Optimizer:
    module = _import_compiled("heavyball")
    optimizer: Optimizer = module.Muon(parameters, lr, (MOMENTUM, BETA2), weight_decay=weight_decay, nesterov=False)
    return optimizer


def _variant(name: str, ns_coefficients: str = "muon", **options: Any) -> Contender:
    build = _Ours({"ns_coefficients": ns_coefficients, **options})
    return Contender(name, build, ours=True, takes_stacks=True, ns_coefficients=ns_coefficients)


CONTENDERS = (
    _variant("ours"),
    _variant("ours, muon", normalize_neurons=False),
    _variant("ours, polar_express", ns_coefficients="polar_express"),
    _variant("ours, momentum bfloat16", momentum_dtype="bfloat16"),
    _variant("ours, momentum int8", momentum_dtype="int8"),
    Contender("torch.optim.Muon", _torch_muon),
    Contender("torch.optim.AdamW fused", _torch_adamw, orthogonalizes=False, takes_stacks=True),
    Contender(
        "dion.NorMuon", _dion("NorMuon"), "dion", takes_stacks=True, note="torch.compile; Polar Express coefficients"
    ),
    Contender("dion.Muon", _dion("Muon"), "dion", takes_stacks=True, note="torch.compile; Polar Express coefficients"),
    Contender(
        "authors' NorMuon",
        _authors,
        "normuon",
        takes_stacks=True,
        dtype=torch.bfloat16,
        note="bfloat16 parameters: it refuses float32; Nesterov",
    ),
    Contender("pytorch_optimizer.Muon", _pytorch_optimizer, "pytorch_optimizer"),
    Contender(
        "heavyball.Muon",
        _heavyball,
        "heavyball",
        note="torch.compile; five polynomials of its own; stochastic rounding",
    ),
)
