"""The step of every other parameter: torch's own functional AdamW."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim.adamw import adamw

# Devices whose fused kernel takes every floating dtype and a tensor lr; elsewhere torch chooses foreach or a loop.
FUSED_DEVICES = ("cpu", "cuda")


def step_adamw(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    states: Sequence[Mapping[str, Tensor]],
    group: Mapping[str, Any],
) -> None:
    """Take one AdamW step on the parameters of one group; bitwise ``torch.optim.AdamW(fused=True)`` where that runs.

    Args:
        parameters: Any shapes. Modified in place.
        gradients: One per parameter, in any floating dtype. Not modified.
        states: ``exp_avg``, ``exp_avg_sq``, ``step`` of each. Modified in place.
        group: ``lr``, ``betas``, ``eps``, ``weight_decay``.
    """
    beta1, beta2 = group["betas"]
    adamw(
        list(parameters),
        [gradient.to(parameter.dtype) for gradient, parameter in zip(gradients, parameters, strict=True)],
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [state["step"] for state in states],
        fused=all(parameter.device.type in FUSED_DEVICES for parameter in parameters) or None,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
