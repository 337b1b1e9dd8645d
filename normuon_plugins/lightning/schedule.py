"""Learning-rate schedules per optimizer step, equal to those of transformers' ``get_scheduler``."""

from __future__ import annotations

import math
from functools import partial
from numbers import Real

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

SHAPES = ("constant", "linear", "cosine")


def build_schedule(optimizer: Optimizer, shape: str, *, warmup: int | float, total_steps: int) -> LambdaLR:
    """Return a scheduler that is stepped once per optimizer step.

    Args:
        optimizer: Every group's ``lr`` is multiplied by the same factor.
        shape: One of ``SHAPES``: after the warmup, constant, or falling to zero at ``total_steps`` on a line or a
            half cosine.
        warmup: Steps of linear warmup from zero; below 1, the fraction of ``total_steps``, rounded up.
        total_steps: Optimizer steps of the whole run.

    Raises:
        ValueError: If ``shape`` is not known or ``warmup`` is negative or longer than the run.
    """
    if shape not in SHAPES:
        raise ValueError(f"scheduler={shape!r} is not known; use one of {SHAPES}, or None and a scheduler of your own.")
    if not isinstance(warmup, Real):
        raise ValueError(f"warmup={warmup!r} must be a number of steps, or a fraction of the run below 1.")
    warmup_steps = math.ceil(warmup * total_steps) if 0 < warmup < 1 else int(warmup)
    if not 0 <= warmup_steps <= total_steps:
        raise ValueError(
            f"warmup={warmup} is not within the run's {total_steps} steps; a number below 1 is a fraction of them."
        )
    return LambdaLR(optimizer, partial(_factor, shape=shape, warmup_steps=warmup_steps, total_steps=total_steps))


def _factor(step: int, *, shape: str, warmup_steps: int, total_steps: int) -> float:
    if step < warmup_steps:
        return step / warmup_steps
    if shape == "constant":
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return 1.0 - progress if shape == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
