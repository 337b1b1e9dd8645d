"""What is compared: AdamW, and the hidden matrices on variants of NorMuon."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from orthogonalizers.auon import cosh_rms_scaling
from orthogonalizers.reg import row_and_column_scaling
from settings import BETAS
from torch import Tensor, nn
from torch.optim import Optimizer

from normuon_plugins import build_normuon, plan_parameters

ORTHOGONALIZERS: dict[str, Callable[[Tensor], Tensor]] = {
    "reg": row_and_column_scaling,
    "auon": cosh_rms_scaling,
}


@dataclass(frozen=True)
class Method:
    """One optimizer of the comparison.

    Attributes:
        name: Unique, as printed.
        options: Of NorMuon; None is AdamW on everything. ``orthogonalizer`` names one of ``ORTHOGONALIZERS``,
            ``cautious_decay`` is ``decay_cautiously``, and ``adamw_lr_ratio`` is what ``adamw_lr`` is multiplied by.
        unit: How a learning rate of this method compares with that of an update of RMS 0.2, as a function of the width:
            where tuning begins.
    """

    name: str
    options: dict[str, Any] | None
    unit: Callable[[int], float] = lambda width: 1.0


def _original(width: int) -> float:
    """Return the ratio of the two learning-rate conventions for square matrices: docs/learning_rate.md."""
    return 0.23 * width**0.5


def _unit_norm(width: int) -> float:
    """Return what makes an RMS of 0.2 of a square matrix of norm 1."""
    return 0.2 * width


# Spelled out, so that a changed default of NorMuon changes no method: the ledger knows methods by name.
PAPER = {
    "normalize_neurons": True,
    "nesterov": False,
    "adjust_lr_fn": "match_rms_adamw",
    "ns_coefficients": "muon",
}
MUON = {**PAPER, "normalize_neurons": False}
# Options of a method that are not NorMuon's.
OWN_OPTIONS = ("orthogonalizer", "cautious_decay", "adamw_lr_ratio")

METHODS = (
    Method("AdamW", None),
    Method("Muon", MUON),
    Method("Muon, Nesterov", {**MUON, "nesterov": True}),
    Method("NorMuon", PAPER),
    Method("NorMuon, Nesterov", {**PAPER, "nesterov": True}),
    Method("NorMuon, original scaling", {**PAPER, "adjust_lr_fn": "original"}, _original),
    Method("NorMuon, Polar Express", {**PAPER, "ns_coefficients": "polar_express"}),
    Method("NorMuon, Nesterov, Polar Express", {**PAPER, "nesterov": True, "ns_coefficients": "polar_express"}),
    Method("NorMuon, cautious decay", {**PAPER, "cautious_decay": True}),
    Method("REG", {**MUON, "orthogonalizer": "reg"}),
    Method("AuON", {**MUON, "orthogonalizer": "auon", "adjust_lr_fn": "original"}, _unit_norm),
)


def find_method(name: str) -> Method:
    """Return the method called ``name``."""
    return next(method for method in METHODS if method.name == name)


def make_optimizer(
    model: nn.Module, method: Method, *, lr: float, adamw_lr: float, weight_decay: float, **plan: Any
) -> Optimizer:
    """Return the optimizer of one run.

    Under every method the same parameters take ``lr`` and ``weight_decay`` (the hidden matrices, by the plan), and all
    others ``adamw_lr`` with the same betas and no decay; AdamW trains the hidden matrices with these betas, too.

    Args:
        model: What it trains.
        method: One of ``METHODS``.
        lr: Learning rate of the hidden matrices.
        adamw_lr: Learning rate of everything else.
        weight_decay: Of the hidden matrices.
        **plan: Options of ``plan_parameters``, such as ``lora``.
    """
    if method.options is None:
        hidden = {id(row.parameter) for row in plan_parameters(model) if row.algorithm == "normuon"}
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in trained if id(p) in hidden], "lr": lr, "weight_decay": weight_decay},
            {"params": [p for p in trained if id(p) not in hidden], "lr": adamw_lr, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW([group for group in groups if group["params"]], betas=BETAS, fused=True)
    options = {key: value for key, value in method.options.items() if key not in OWN_OPTIONS}
    adamw_lr *= method.options.get("adamw_lr_ratio", 1.0)
    if "orthogonalizer" in method.options:
        options["orthogonalize_fn"] = ORTHOGONALIZERS[method.options["orthogonalizer"]]
    optimizer = build_normuon(model, lr=lr, adamw_lr=adamw_lr, weight_decay=weight_decay, **options, **plan)
    if "cautious_decay" in method.options:
        decay_cautiously(optimizer)
    return optimizer


def decay_cautiously(optimizer: Optimizer) -> None:
    """Decay no entry that the step itself takes away from zero (Chen et al., https://arxiv.org/abs/2510.12402).

    The optimizer decays nothing any more; what its groups said is done before and after every step.
    """
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    before: dict[Tensor, Tensor] = {}
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0

    def remember(*_: Any) -> None:
        for group, decay in zip(optimizer.param_groups, decays, strict=True):
            before.update({parameter: parameter.detach().clone() for parameter in group["params"] if decay})

    @torch.no_grad()
    def decay_after(*_: Any) -> None:
        for group, decay in zip(optimizer.param_groups, decays, strict=True):
            for parameter in group["params"] if decay else ():
                weight = before.pop(parameter)
                parameter.sub_(weight * (weight * (weight - parameter) >= 0) * (group["lr"] * decay))

    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(decay_after)
