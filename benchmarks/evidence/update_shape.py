"""What an AdamW update looks like, matrix by matrix, and what the rule of match_progress_adamw makes of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

# The RMS of "match_rms_adamw", which the factor is relative to.
FIXED_RMS = 0.2


def describe_update(state: dict[str, Any], group: dict[str, Any]) -> dict[str, float]:
    """Return what AdamW's last update of a matrix was like, from its state alone.

    With ``M`` and ``v`` the bias-corrected moments, ``v`` averaged over the matrix, and ``k`` the effective rank
    ``(nuclear norm / norm)^2`` of ``M``: an orthogonal step that lowers the loss as ``M / sqrt(v)`` does has an RMS of
    ``||M||^2 / (sqrt(v) * nuclear norm) / sqrt(max(m, n))``. NorMuon's neuron step is left out.

    Args:
        state: Of one matrix.
        group: For its betas and epsilon.

    Returns:
        ``rms`` of the update over the learning rate, ``effective_rank`` as a share of ``min(m, n)``, and ``factor``:
        the RMS of the rule over ``FIXED_RMS``.
    """
    (beta1, beta2), step = group["betas"], float(state["step"])
    momentum = state["exp_avg"].float() / (1 - beta1**step)
    squares = state["exp_avg_sq"].float() / (1 - beta2**step)
    update = momentum / (squares.sqrt() + group["eps"])
    nuclear, norm = torch.linalg.svdvals(momentum).sum().item(), momentum.norm().item()
    if norm == 0:
        return {"rms": 0.0, "effective_rank": 0.0, "factor": 0.0}
    rule = norm**2 / (squares.mean().sqrt().item() * nuclear) / math.sqrt(max(momentum.shape))
    return {
        "rms": _rms(update),
        "effective_rank": (nuclear / norm) ** 2 / min(momentum.shape),
        "factor": rule / FIXED_RMS,
    }


def _rms(tensor: Tensor) -> float:
    return tensor.square().mean().sqrt().item()


def watch_updates(optimizer: AdamW, matrices: dict[str, nn.Parameter], steps: Sequence[int]) -> list[dict[str, Any]]:
    """Return a list that grows by a record per matrix after each of ``steps``, counted from 1.

    Args:
        optimizer: Not stepped yet.
        matrices: To describe, by name.
        steps: When.
    """
    records: list[dict[str, Any]] = []
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    taken = 0

    def after_step(*_: Any) -> None:
        nonlocal taken
        taken += 1
        if taken in steps:
            for name, parameter in matrices.items():
                found = describe_update(optimizer.state[parameter], groups[id(parameter)])
                records.append({"step": taken, "matrix": name, **found})

    optimizer.register_step_post_hook(after_step)
    return records
