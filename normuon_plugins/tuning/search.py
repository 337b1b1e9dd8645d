"""Which learning rates to try next: powers of two around the start, short runs first, each knob to its optimum."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable

from normuon_plugins.tuning.grid import BOTH, KNOBS, START, Point, Run

# Short runs are this part of a full one, and are not worth it where a full one is shorter than SHORTEST steps.
SHORT_PART = 4
SHORTEST = 20
# Short runs look for the order of magnitude, in factors of 2^COARSE, and may spend this part of the budget.
COARSE = 2
COARSE_PART = 3
# How often the winner is repeated on other orders of the batches, by the least budget that pays for it (in full runs).
REPEATS = ((12, 2), (6, 1), (0, 0))
# Full runs that any search needs: short ones, the best of them, and the start to compare it with.
LEAST = 4


Steps = Generator[Run, float, Point]


class _SpentError(Exception):
    """The next run would not fit into what may be spent."""


class Search:
    """Asks for runs, one at a time, and learns their losses.

    Args:
        steps: Of a full run.
        budget: Full runs that may be spent, at least ``LEAST``: together, runs have at most ``steps * budget`` steps.
        knobs: Those of ``KNOBS`` to turn.
        has_start: Whether the start is what the user has: then it is run at full length too, and the best is compared
            with it on other orders of the batches. Else the search begins with both rates at once, over a wide range.

    Raises:
        ValueError: If the budget is too small.

    Attributes:
        losses: What was tried, in order.
        repeats: Orders of the batches that the best is repeated on.
    """

    def __init__(self, *, steps: int, budget: int, knobs: Iterable[str] = KNOBS, has_start: bool = True) -> None:
        if budget < LEAST:
            raise ValueError(f"budget={budget!r} must be at least {LEAST} runs.")
        self.steps = steps
        self.short = steps // SHORT_PART if steps >= SHORTEST else steps
        self.allowed = steps * budget
        self.knobs = tuple(knobs)
        self.has_start = has_start
        self.losses: dict[Run, float] = {}
        self.repeats = next(repeats for least, repeats in REPEATS if budget >= least)

    @property
    def spent(self) -> int:
        """Steps of all runs so far."""
        return sum(run.steps for run in self.losses)

    def runs(self) -> Steps:
        """Yield runs, be sent their losses (infinite where a run diverged), and return the best point."""
        reserve = self.steps * (1 + 2 * self.repeats if self.has_start else self.repeats)
        limit = self.allowed - reserve
        near = yield from self._follow(START, self.short, COARSE, self.allowed // COARSE_PART, wide=not self.has_start)
        best = yield from self._follow(near, self.steps, 1, limit)
        if self.has_start:
            yield from self._ask(START, self.steps, self.allowed)
            if self._loss(START, self.steps) < self._loss(best, self.steps):
                best = yield from self._follow(START, self.steps, 1, limit)
        if not self.has_start or best != START:
            for order in range(1, self.repeats + 1):
                for point in (best, START) if self.has_start else (best,):
                    yield from self._ask(point, self.steps, self.allowed, order)
        return best

    def open_ends(self, best: Point) -> list[tuple[str, int]]:
        """Return knobs and directions (1 or -1) in which no neighbour of ``best`` was tried at full length."""
        return [
            (knob, places)
            for knob in self.knobs
            for places in (1, -1)
            if Run(best.moved(knob, places), self.steps) not in self.losses
        ]

    def _loss(self, point: Point, steps: int) -> float:
        return self.losses.get(Run(point, steps), math.inf)

    def _ask(self, point: Point, steps: int, limit: int, order: int = 0) -> Generator[Run, float, None]:
        run = Run(point, steps, order)
        if run in self.losses:
            return
        if self.spent + steps > limit and self.losses:
            raise _SpentError
        self.losses[run] = yield run

    def _follow(self, start: Point, steps: int, stride: int, limit: int, *, wide: bool = False) -> Steps:
        """Follow one knob after the other until none moves; return the best point, also where ``limit`` ends it."""
        best = start
        try:
            yield from self._ask(best, steps, limit)
            while math.isinf(self._loss(best, steps)):  # where everything diverges there is no slope to follow
                best = best.moved(BOTH if len(self.knobs) > 1 else self.knobs[0], -stride)
                yield from self._ask(best, steps, limit)
            if wide and len(self.knobs) > 1:
                best = yield from self._line(best, BOTH, steps, stride, limit)
            before = None
            while before != best:
                before = best
                for knob in self.knobs:
                    best = yield from self._line(best, knob, steps, stride, limit)
        except _SpentError:
            tried = [run.point for run in self.losses if run.steps == steps and run.order == 0]
            best = min(tried, key=lambda point: self._loss(point, steps), default=start)
        return best

    def _line(self, best: Point, knob: str, steps: int, stride: int, limit: int) -> Steps:
        """Follow a knob until both neighbours are no better. Upwards first: NorMuon's best rates lie above AdamW's."""
        for places in (stride, -stride):
            yield from self._ask(best.moved(knob, places), steps, limit)
            while self._loss(best.moved(knob, places), steps) < self._loss(best, steps):
                best = best.moved(knob, places)
                yield from self._ask(best.moved(knob, places), steps, limit)
        return best
