"""What a search says, in a table and in sentences."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from normuon_plugins.tuning.comparison import as_good

if TYPE_CHECKING:
    from normuon_plugins.tuning.result import LearningRates


def table(result: LearningRates) -> list[str]:
    """Return the lines of a table: a row per trial, by length and rates; the best one is marked."""
    best = result.best["lr"], result.best.get("adamw_lr")
    rows = [("lr", "adamw_lr", "steps", "order", "loss", "")]
    for trial in sorted(result.trials, key=lambda trial: (trial.steps, trial.order, trial.lr, trial.adamw_lr or 0.0)):
        is_best = trial.rates == best and trial.steps == result.steps and trial.order == 0
        rows.append(
            (
                f"{trial.lr:g}",
                "-" if trial.adamw_lr is None else f"{trial.adamw_lr:g}",
                f"{trial.steps}",
                f"{trial.order}",
                number(trial.loss),
                "<- best" if is_best else "",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def sentences(result: LearningRates) -> list[str]:
    """Return what these numbers say; first the verdict."""
    found = [_verdict(result)]
    for knob in result.best if result.noise else ():
        values = as_good(result, knob)
        if len(values) > 1:
            found.append(f"Within that, {knob} from {values[0]:g} to {values[-1]:g} is as good.")
    for knob, places in result.open_ends:
        found.append(
            f"The budget ended before a {'larger' if places > 0 else 'smaller'} {knob} than {result.best[knob]:g} was"
            " tried: a larger budget may find better."
        )
    source = "batches of yours that no run trained on" if result.was_split else "validation batches"
    found.append(
        f"Loss is the mean over {result.held_out_batches} {source}; before training it was"
        f" {number(result.untrained_loss)}."
    )
    if result.steps > result.training_batches:
        found.append(f"A full run used its {result.training_batches} batches more than once: the rates fit that.")
    diverged = sum(math.isinf(trial.loss) for trial in result.trials)
    if diverged:
        found.append(f"{diverged} of {len(result.trials)} runs diverged; their loss counts as infinite.")
    found.append(
        f"These are rates for runs of {result.steps} steps. A run many times as long wants a smaller lr: try half, too."
    )
    return found


def _verdict(result: LearningRates) -> str:
    best = _pair(result.best)
    if math.isinf(result.loss):
        return "Every run diverged. Look at the data and the loss before the learning rates."
    noise = None if result.noise is None else f"another order of the batches moves the loss by {result.noise:.2g}"
    if result.start is None:
        return f"Best: {best}. " + (
            f"To compare with: {noise}." if noise else "No run was repeated, so small differences may be chance."
        )
    if result.start == result.best:
        return f"Keep {_pair(result.start)}: nothing that was tried is better."
    start, gain = _pair(result.start), result.gain or 0.0
    if result.is_gain and math.isinf(gain):
        return f"Take {best}: with {start} the loss diverged."
    if result.is_gain and noise:
        return f"Take {best}: better than {start} by {gain:.2g} on other orders of the batches, and {noise}."
    if result.is_gain:
        return f"Take {best}: better than {start} by {gain:.2g}, in one run of each; a larger budget repeats them."
    if gain > 0:
        return f"Keep {start}: {best} is better by {gain:.2g} on other orders of the batches, and {noise}."
    return f"Keep {start}: {best} is better in one order of the batches, and worse in others."


def _pair(rates: Mapping[str, float]) -> str:
    return " and ".join(f"{name} {rate:g}" for name, rate in rates.items())


def number(loss: float) -> str:
    """Return a loss in five digits.

    Example:
        >>> number(3.14159), number(float("inf"))
        ('3.1416', 'diverged')
    """
    return "diverged" if math.isinf(loss) else f"{loss:.5g}"


def duration(seconds: float) -> str:
    """Return a time in the unit that fits.

    Example:
        >>> duration(3.2), duration(100), duration(5400)
        ('3 seconds', '2 minutes', '1.5 hours')
    """
    if seconds < 60:
        return f"{max(1, round(seconds))} seconds"
    return f"{round(seconds / 60)} minutes" if seconds < 3600 else f"{seconds / 3600:.1f} hours"
