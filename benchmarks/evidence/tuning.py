"""Tuning on a grid that extends itself, the same rule and budget for every method."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

# Learning rates lie on powers of two around the start; zero ends the grid of weight decays.
DECAYS = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0)
# Runs that every method may spend; more only where its optimum would otherwise lie on the border of what was tried.
BUDGET = 14

KNOBS = ("lr", "adamw_lr", "decay")
Losses = Mapping["Point", float]


@dataclass(frozen=True)
class Point:
    """A place on the grid: two exponents of two, relative to the start, and a place in ``DECAYS``."""

    lr: int = 0
    adamw_lr: int = 0
    decay: int = 1

    @property
    def exists(self) -> bool:
        """Whether the grid has it: weight decay ends at zero, and where the table ends."""
        return 0 <= self.decay < len(DECAYS)

    def moved(self, **by: int) -> Point:
        """Return the point so many places further."""
        return replace(self, **{knob: getattr(self, knob) + places for knob, places in by.items()})

    def neighbours(self, knobs: tuple[str, ...] = KNOBS) -> list[Point]:
        """Return the existing points one place away along each of ``knobs``."""
        found = [self.moved(**{knob: places}) for knob in knobs for places in (1, -1)]
        return [point for point in found if point.exists]

    def diagonals(self) -> list[Point]:
        """Return the points where both learning rates move by one place; first those that keep their product."""
        signs = sorted(product((1, -1), repeat=2), key=lambda pair: pair[0] * pair[1])
        return [self.moved(lr=a, adamw_lr=b) for a, b in signs]


def best_of(losses: Losses) -> Point:
    """Return the point of smallest loss, the first one of equals."""
    return min(losses, key=lambda point: losses[point])


def tune(start: Point, budget: int = BUDGET, knobs: Sequence[str] = KNOBS) -> Generator[list[Point], Losses, Point]:
    """Search for the best point: yields points to try, is sent all losses so far, and returns the best of them.

    One knob after the other is followed to its optimum, again until none moves: then every neighbour of the best point
    was tried and is worse. What is left of the budget goes to the diagonals of the learning rates, and a better one
    found there begins the search anew. The optimum lies inside the grid always, the budget gives way.

    Args:
        start: Where the search begins.
        budget: Runs to spend.
        knobs: Those to turn; the others stay at ``start``.
    """
    losses = yield [start]
    while True:
        best = best_of(losses)
        for knob in knobs:
            while new := [point for point in best_of(losses).neighbours((knob,)) if point not in losses]:
                losses = yield new
        if best_of(losses) != best:
            continue
        diagonals = best.diagonals() if {"lr", "adamw_lr"} <= set(knobs) else []
        untried = [point for point in diagonals if point not in losses]
        if not untried or len(losses) >= budget:
            return best
        losses = yield untried[: budget - len(losses)]
