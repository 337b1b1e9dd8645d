"""Step times: every contender once per repetition, in rotating order, beside the plain products of the same sizes."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import ceil
from typing import Any

import torch
from torch import Tensor

from normuon_plugins.core.orthogonalize import multiplications

# A product below this is repeated, so that the clock and the call are small beside it: 5 ms at 1 TFLOP/s.
LEAST_OPERATIONS = 5e9
MOST_CALLS = 20


def synchronize(device: torch.device) -> None:
    """Wait for the device, where it works on its own."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(function: Callable[[], Any], device: torch.device) -> float:
    """Return how long ``function`` takes, with all that it started on ``device``."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def interleave(
    runs: Mapping[str, Callable[[], float]], repetitions: Iterable[int]
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Call every run once per repetition, each time beginning with another one.

    What disturbs the machine for a while then disturbs all of them, and none always follows the same one.

    Args:
        runs: Functions that do something once and return what they measured.
        repetitions: Their numbers, from zero.

    Returns:
        What each run returned, and the error of each one that raised, which is then left out.
    """
    found: dict[str, list[float]] = {name: [] for name in runs}
    failed: dict[str, str] = {}
    names = list(runs)
    for repetition in repetitions:
        first = repetition % len(names)
        for name in names[first:] + names[:first]:
            if name not in failed:
                try:
                    found[name].append(runs[name]())
                except Exception as error:  # a peer may raise anything, and the others are still measured
                    failed[name] = describe(error)
    return {name: times for name, times in found.items() if name not in failed}, failed


def describe(error: Exception) -> str:
    """Return the kind of an error and the first line that it says."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"


def quartiles(times: Sequence[float]) -> tuple[float, float, float]:
    """Return lower quartile, median and upper quartile."""
    if len(times) == 1:
        return times[0], times[0], times[0]
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return low, middle, high


def dense_multiplications(sizes: Sequence[tuple[int, int]], ns_steps: int) -> int:
    """Return the scalar multiplications of Newton-Schulz with three full products a step."""
    total = 0
    for size in sizes:
        short, long = sorted(size)
        total += ns_steps * (2 * short * short * long + short**3)
    return total


def needed_multiplications(
    sizes: Sequence[tuple[int, int]], ns_steps: int, ns_coefficients: str, device: torch.device
) -> int:
    """Return the scalar multiplications that our Newton-Schulz takes for the same."""
    options = {"ns_coefficients": ns_coefficients, "device": device}
    return sum(count * multiplications(*size, ns_steps, **options) for size, count in Counter(sizes).items())


class PlainProducts:
    """The three products of a Newton-Schulz step as ``torch.mm``, for every size of a model.

    Args:
        sizes: ``(rows, cols)`` of every matrix.
        ns_steps: Steps of Newton-Schulz, by which the products are weighted.
        dtype: Dtype of the products.
        device: Where.
    """

    def __init__(
        self, sizes: Sequence[tuple[int, int]], ns_steps: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.ns_steps = ns_steps
        self.dtype = dtype
        self.device = device
        self.counts = Counter((min(size), max(size)) for size in sizes)
        self.operands = {
            (short, long): (
                torch.randn(short, long, dtype=dtype, device=device),
                torch.randn(short, short, dtype=dtype, device=device),
            )
            for short, long in self.counts
        }

    def __call__(self) -> float:
        """Return the seconds that all products of one Newton-Schulz of all matrices take."""
        total = 0.0
        for size, count in self.counts.items():
            wide, square = self.operands[size]
            each = [self._product(*pair) for pair in ((wide, wide.mT), (square, square), (square, wide))]
            total += self.ns_steps * count * sum(each)
        return total

    def _product(self, left: Tensor, right: Tensor) -> float:
        """Return the seconds of one product into memory that is there."""
        out = left.new_empty(left.shape[0], right.shape[1])
        calls = min(MOST_CALLS, ceil(LEAST_OPERATIONS / (2 * left.numel() * right.shape[1])))

        def repeat() -> None:
            for _ in range(calls):
                torch.mm(left, right, out=out)

        torch.mm(left, right, out=out)
        return seconds(repeat, self.device) / calls
