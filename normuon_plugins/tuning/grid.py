"""Places on the grid of learning rates, runs to be done there, and trials: runs that were done."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

KNOBS = ("lr", "adamw_lr")
BOTH = "both"


@dataclass(frozen=True)
class Point:
    """A place on the grid: two exponents of two, relative to the start."""

    lr: int = 0
    adamw_lr: int = 0

    def moved(self, knob: str, places: int) -> Point:
        """Return the point so many places further along a knob, or along both."""
        knobs = KNOBS if knob == BOTH else (knob,)
        return replace(self, **{name: getattr(self, name) + places for name in knobs})


START = Point()


def rates_at(point: Point, start: Mapping[str, float], knobs: Iterable[str] = KNOBS) -> dict[str, float]:
    """Return the learning rates of a point, in three digits, so that what is printed is what was tried.

    Example:
        >>> rates_at(Point(lr=3), {"lr": 3e-4, "adamw_lr": 1e-4})
        {'lr': 0.0024, 'adamw_lr': 0.0001}
    """
    places = {knob: getattr(point, knob) for knob in knobs}
    return {
        knob: float(f"{start[knob] * 2.0**exponent:.3g}") if exponent else start[knob]
        for knob, exponent in places.items()
    }


@dataclass(frozen=True)
class Run:
    """A training run to be done.

    Attributes:
        point: Where on the grid.
        steps: Optimizer steps.
        order: Of the batches: 0 is the user's, every other number another one.
    """

    point: Point
    steps: int
    order: int = 0


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A training run that was done.

    Attributes:
        lr: Peak learning rate of the hidden matrices.
        adamw_lr: Of everything else; None where the model has nothing else.
        steps: Optimizer steps.
        order: Of the batches: 0 is the user's, every other number another one.
        loss: Mean over the held-out batches after the last step; infinite where the run diverged.
    """

    lr: float
    adamw_lr: float | None = None
    steps: int
    order: int = 0
    loss: float

    @property
    def rates(self) -> tuple[float, float | None]:
        """Both learning rates."""
        return self.lr, self.adamw_lr
