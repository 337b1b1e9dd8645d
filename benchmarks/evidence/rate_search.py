"""Every method at AdamW's own learning rate and beside it, and each followed to its own best one."""

from __future__ import annotations

import math
import statistics
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from evidence.adaptation import Adaptation
from evidence.ledger import Ledger
from evidence.one_rate import ADAMW
from evidence.pool import Task

Losses = Mapping[int, float]


def follow(places: Sequence[int]) -> Generator[list[int], Losses, int]:
    """Search a line of powers of two for the smallest loss.

    Yields the places to try, is sent the losses of all that were tried, and returns the best place: both its neighbours
    were tried and are not better.

    Args:
        places: To try first, whatever comes.
    """
    losses = yield list(places)
    while True:
        best = min(losses, key=lambda place: losses[place])
        untried = [place for place in (best - 1, best + 1) if place not in losses]
        if not untried:
            return best
        losses = yield untried


def search(base: Adaptation, places: Sequence[int], seeds: Sequence[int], ledger: Ledger) -> Task[dict[int, Any]]:
    """Follow the method of ``base`` to its best learning rate, by the mean over seeds; see ``Pool``.

    Args:
        base: A run; its rate is place 0, and its seed does not matter.
        places: To try first: exponents of two.
        seeds: Of every rate.
        ledger: Of all runs.

    Returns:
        The results of all seeds by place, in order of the places.
    """
    steps = follow(places)
    results: dict[int, list[Any]] = {}
    wanted = next(steps)
    while True:
        runs = {place: [replace(base, lr=base.lr * 2.0**place, seed=seed) for seed in seeds] for place in wanted}
        yield [run for several in runs.values() for run in several]
        results |= {place: [ledger[run] for run in several] for place, several in runs.items()}
        try:
            wanted = steps.send({place: mean_loss(several) for place, several in results.items()})
        except StopIteration:
            return dict(sorted(results.items()))


def compare(base: Adaptation, method: str, seeds: Sequence[int], ledger: Ledger) -> Task[dict[str, Any]]:
    """Find AdamW's best learning rate, then run a method there, at half and at twice of it, and on to its own best.

    The search for AdamW's is the same for all methods, and its runs are done once; see ``Pool``.

    Returns:
        ``method``, its best ``lr``, and for each of its ``rates`` the ``lr`` and every seed's result.
    """
    results = yield from search(replace(base, method=ADAMW), (-1, 0, 1), seeds, ledger)
    if method != ADAMW:
        best = best_place(results)
        results = yield from search(replace(base, method=method), (best - 1, best, best + 1), seeds, ledger)
    rates = [
        {"lr": base.lr * 2.0**place, **{key: [result[key] for result in several] for key in several[0]}}
        for place, several in results.items()
    ]
    return {"method": method, "lr": base.lr * 2.0 ** best_place(results), "rates": rates}


def best_place(results: Mapping[int, Sequence[Any]]) -> int:
    """Return the place of the smallest mean loss, the first one of equals."""
    return min(results, key=lambda place: mean_loss(results[place]))


def mean_loss(results: Sequence[Any]) -> float:
    """Return the mean over seeds, infinite if one is."""
    losses = [result["loss"] for result in results]
    return statistics.fmean(losses) if all(map(math.isfinite, losses)) else math.inf
