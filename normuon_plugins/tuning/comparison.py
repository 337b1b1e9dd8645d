"""Whether the best rates are better than others by more than chance."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from normuon_plugins.tuning.result import LearningRates


def losses(result: LearningRates, rates: Mapping[str, float]) -> list[float]:
    """Return the losses of full runs with these rates, by the order of their batches, the user's own first."""
    wanted = rates["lr"], rates.get("adamw_lr"), result.steps
    return [trial.loss for trial in result.trials if (*trial.rates, trial.steps) == wanted] or [math.inf]


def gain(result: LearningRates) -> float | None:
    """See ``LearningRates.gain``. The order that chose the best flatters it, so that others count if there are any."""
    if result.start is None:
        return None
    if result.start == result.best:
        return 0.0
    pairs = _pairs(result)
    fresh = pairs[1:] or pairs
    return sum(before - after for before, after in fresh) / len(fresh)


def noise(result: LearningRates) -> float | None:
    """See ``LearningRates.noise``."""
    gaps = []
    for rates in (result.best, result.start):
        finite = [loss for loss in losses(result, rates) if math.isfinite(loss)] if rates is not None else []
        if len(finite) > 1:
            gaps.append(max(finite) - min(finite))
    return max(gaps, default=None)


def is_gain(result: LearningRates) -> bool:
    """See ``LearningRates.is_gain``."""
    won = gain(result)
    if not won:
        return False
    return all(before > after for before, after in _pairs(result)) and won > (noise(result) or 0.0)


def as_good(result: LearningRates, knob: str) -> list[float]:
    """Return the values of a rate, the best one among them, whose loss is no further from the best than the noise.

    Args:
        result: Of a search.
        knob: ``"lr"`` or ``"adamw_lr"``; the other one is at its best.
    """
    others = [name for name in result.best if name != knob]
    return sorted(
        getattr(trial, knob)
        for trial in result.trials
        if (trial.steps, trial.order) == (result.steps, 0)
        and all(getattr(trial, name) == result.best[name] for name in others)
        and trial.loss <= result.loss + (noise(result) or 0.0)
    )


def _pairs(result: LearningRates) -> list[tuple[float, float]]:
    """Return the losses of the start and of the best, by the order of the batches."""
    start = losses(result, result.start) if result.start is not None else []
    return list(zip(start, losses(result, result.best), strict=False))
