"""What a few seeds allow to say: intervals from Student's t, and paired tests."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from scipy import stats

LEVEL = 0.95


class Interval(NamedTuple):
    """A mean and the bounds of its interval."""

    mean: float
    low: float
    high: float

    def shown(self, digits: int = 4, scale: float = 1.0, sign: str = "") -> str:
        """Return ``mean [low, high]``."""
        mean, low, high = (f"{value * scale:{sign}.{digits}f}" for value in self)
        return f"{mean} [{low}, {high}]"


def confidence(values: Sequence[float]) -> Interval:
    """Return the interval that covers the mean of the population in 95 % of such samples."""
    return _around(values, 1 / len(values))


def prediction(values: Sequence[float], fresh: int) -> Interval:
    """Return the interval that covers the mean of ``fresh`` further values in 95 % of such samples."""
    return _around(values, 1 / len(values) + 1 / fresh)


def _around(values: Sequence[float], variance_share: float) -> Interval:
    mean = statistics.fmean(values)
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return Interval(mean, math.nan, math.nan)
    half = stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * statistics.stdev(values) * math.sqrt(variance_share)
    return Interval(mean, mean - half, mean + half)


def paired_p(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return the p-value of the paired t-test, two-sided: how often equal means would differ this much."""
    return float(stats.ttest_rel(ours, theirs).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values adjusted for their number (Holm, 1979), in the same order."""
    adjusted = [math.nan] * len(p_values)
    order = sorted((index for index, p in enumerate(p_values) if p == p), key=lambda index: p_values[index])
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
