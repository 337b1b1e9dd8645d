"""The step of every other parameter: torch's own functional AdamW."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from normuon_plugins.core.compensation import COMPENSATION, exact_weight, round_weight
from normuon_plugins.core.step_size import as_scalar

# Devices whose fused kernel takes every floating dtype and a tensor lr.
FUSED_DEVICES = ("cpu", "cuda")
# Devices on which torch's other kernels take the number of the step without reading it back (``capturable``).
CAPTURABLE_DEVICES = ("cuda", "xpu")

# Parameter, gradient, exp_avg, exp_avg_sq, step.
Row = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def step_adamw(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    states: Sequence[Mapping[str, Tensor]],
    group: Mapping[str, Any],
    bucket_bytes: int,
) -> None:
    """Take one AdamW step on the parameters of one group, fused where that is right.

    Args:
        parameters: Any shapes. Modified in place.
        gradients: One per parameter, in any floating dtype. Not modified.
        states: ``exp_avg``, ``exp_avg_sq``, ``step`` of each, and ``kahan_compensation`` of those that keep what
            rounding loses. Modified in place.
        group: ``lr``, ``betas``, ``eps``, ``weight_decay``.
        bucket_bytes: Bound on the float32 copies of compensated parameters, in bytes.
    """
    rows: list[Row] = []
    compensated: list[tuple[Row, Tensor]] = []
    for parameter, gradient, state in zip(parameters, gradients, states, strict=True):
        row = (parameter, gradient, state["exp_avg"], state["exp_avg_sq"], state["step"])
        if COMPENSATION in state:
            compensated.append((row, state[COMPENSATION]))
        else:
            rows.append(row)
    _step(rows, group)
    for batch in _batches(compensated, bucket_bytes):
        _step_compensated(batch, group)
    for (*_, step), _ in compensated:
        step.add_(1)


def _step(rows: Sequence[Row], group: Mapping[str, Any]) -> None:
    """Call torch's functional AdamW."""
    beta1, beta2 = group["betas"]
    for fused in (True, False):
        chosen = [row for row in rows if _fits_fused_kernel(*row[:4]) is fused]
        if not chosen:
            continue
        params, grads, exp_avgs, exp_avg_sqs, steps = (list(column) for column in zip(*chosen, strict=True))
        device = steps[0].device
        adamw(
            params,
            [gradient.to(parameter.dtype) for parameter, gradient in zip(params, grads, strict=True)],
            exp_avgs,
            exp_avg_sqs,
            [],
            steps,
            fused=fused or None,  # None: torch chooses between foreach and a loop
            # The step lies beside the parameter, where the fused kernel wants it; a checkpoint may come from either.
            capturable=not fused and device.type in CAPTURABLE_DEVICES,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=as_scalar(group["lr"], device),
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _batches(rows: Sequence[tuple[Row, Tensor]], bucket_bytes: int) -> Iterator[list[tuple[Row, Tensor]]]:
    """Yield parts of the parameters, whole entries of their first dimension, whose float32 copies are that small.

    A single entry of the first dimension may be larger.
    """
    limit = bucket_bytes // (4 * torch.float32.itemsize)  # weight, gradient and two moments
    batch: list[tuple[Row, Tensor]] = []
    room = limit
    for (*tensors, step), compensation in rows:
        parameter = tensors[0]
        size = max(1, limit * len(parameter) // max(1, parameter.numel())) if parameter.ndim else 1
        columns = [torch.split(tensor.view(tensor.shape or (1,)), size) for tensor in (*tensors, compensation)]
        for *part, lost in zip(*columns, strict=True):
            if batch and part[0].numel() > room:
                yield batch
                batch, room = [], limit
            batch.append(((*part, step), lost))
            room -= part[0].numel()
    if batch:
        yield batch


def _step_compensated(batch: Sequence[tuple[Row, Tensor]], group: Mapping[str, Any]) -> None:
    """Step parts of parameters in float32, from the weight that they were before they were rounded."""
    wide: list[Row] = []
    for (parameter, *tensors, step), compensation in batch:
        gradient, *moments = (tensor.to(torch.float32, memory_format=torch.contiguous_format) for tensor in tensors)
        # Every part of a parameter counts the step.
        wide.append((exact_weight(parameter, compensation), gradient, moments[0], moments[1], step.clone()))
    _step(wide, group)
    for ((parameter, _, *moments, _), compensation), (exact, _, *exact_moments, _) in zip(batch, wide, strict=True):
        round_weight(exact, parameter, compensation)
        for moment, exact_moment in zip(moments, exact_moments, strict=True):
            moment.copy_(exact_moment)


def _fits_fused_kernel(*tensors: Tensor) -> bool:
    """Return whether the fused kernel reads these tensors right.

    On CPU it walks their memory, whatever the strides (torch 2.13): an element of a transposed or sliced parameter gets
    another's update, or its neighbours in memory do. It knows no complex numbers anywhere.
    """
    if tensors[0].is_complex():
        return False
    return all(tensor.device.type in FUSED_DEVICES and tensor.is_contiguous() for tensor in tensors)
