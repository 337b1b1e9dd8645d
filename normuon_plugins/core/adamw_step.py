"""The step of every other parameter: torch's own functional AdamW."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim.adamw import adamw

# Devices whose fused kernel takes every floating dtype and a tensor lr.
FUSED_DEVICES = ("cpu", "cuda")


def step_adamw(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    states: Sequence[Mapping[str, Tensor]],
    group: Mapping[str, Any],
) -> None:
    """Take one AdamW step on the parameters of one group, fused where that is right.

    Args:
        parameters: Any shapes. Modified in place.
        gradients: One per parameter, in any floating dtype. Not modified.
        states: ``exp_avg``, ``exp_avg_sq``, ``step`` of each. Modified in place.
        group: ``lr``, ``betas``, ``eps``, ``weight_decay``.
    """
    beta1, beta2 = group["betas"]
    rows = [
        (parameter, gradient.to(parameter.dtype), state["exp_avg"], state["exp_avg_sq"], state["step"])
        for parameter, gradient, state in zip(parameters, gradients, states, strict=True)
    ]
    for fused in (True, False):
        chosen = [row for row in rows if _fits_fused_kernel(*row[:4]) is fused]
        if not chosen:
            continue
        params, grads, exp_avgs, exp_avg_sqs, steps = (list(column) for column in zip(*chosen, strict=True))
        adamw(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            [],
            steps,
            fused=fused or None,  # None: torch chooses between foreach and a loop
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _fits_fused_kernel(*tensors: Tensor) -> bool:
    """Return whether the fused kernel reads these tensors right.

    On CPU it walks their memory, whatever the strides (torch 2.13): an element of a transposed or sliced parameter gets
    another's update, or its neighbours in memory do.
    """
    return all(tensor.device.type in FUSED_DEVICES and tensor.is_contiguous() for tensor in tensors)
