"""The picture: loss over each learning rate, through the best pair."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from normuon_plugins.extras import require
from normuon_plugins.tuning.comparison import losses

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from normuon_plugins.tuning.grid import Trial
    from normuon_plugins.tuning.result import LearningRates

DPI = 120
FULL, SHORT, OTHER = "tab:orange", "tab:gray", "black"
TITLES = {"lr": "lr: hidden matrices", "adamw_lr": "adamw_lr: everything else"}


def check_target(file: Path) -> None:
    """Raise unless ``draw`` can write such a file: before what takes minutes.

    Raises:
        ImportError: If matplotlib is missing.
        ValueError: If it has no format of that suffix.
    """
    require("matplotlib", extra="tune")
    from matplotlib.backend_bases import FigureCanvasBase

    known = sorted(FigureCanvasBase.filetypes)
    if file.suffix.lower().removeprefix(".") not in known:
        raise ValueError(f"{file}: no picture has such a name; end it in .png, or in one of {', '.join(known)}.")


def draw(result: LearningRates, file: Path) -> Path:
    """Write the picture and return its file; see ``LearningRates.draw``."""
    check_target(file)
    from matplotlib.figure import Figure

    knobs = list(result.best)
    figure = Figure(figsize=(5 * len(knobs), 3.6), layout="constrained")
    row = figure.subplots(1, len(knobs), sharey=True, squeeze=False)[0]
    for axes, knob in zip(row, knobs, strict=True):
        _panel(axes, result, knob)
    row[0].set_ylabel("held-out loss")
    row[0].margins(y=0.15)  # room for the label below the optimum
    low, high = row[0].get_ylim()
    if result.loss < result.untrained_loss < high:  # what is worse than no training leaves the picture
        row[0].set_ylim(top=result.untrained_loss + 0.05 * (result.untrained_loss - low))
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=DPI)
    return file


def _panel(axes: Axes, result: LearningRates, knob: str) -> None:
    """Draw the runs that differ from the best of their length in one rate only."""
    others = [name for name in result.best if name != knob]
    shown: set[float] = set()
    for steps in sorted({trial.steps for trial in result.trials}):
        color = FULL if steps == result.steps else SHORT
        runs = [trial for trial in result.trials if trial.steps == steps and trial.order == 0]
        best = min(runs, key=lambda trial: trial.loss)
        through = result.best if steps == result.steps else {name: getattr(best, name) for name in result.best}
        line = [trial for trial in runs if all(getattr(trial, name) == through[name] for name in others)]
        line.sort(key=lambda trial: getattr(trial, knob))
        shown |= {getattr(trial, knob) for trial in line}
        _line(axes, line, knob, color, f"{steps} steps")
    rate = result.best[knob]
    shown.add(rate)
    if math.isfinite(result.loss):
        axes.plot(rate, result.loss, "o", color=FULL, markersize=9)
        axes.annotate(
            f"{rate:g}", (rate, result.loss), (0, -9), textcoords="offset points", ha="center", va="top", weight="bold"
        )
    if result.start is not None and result.start != result.best:
        begin = result.start[knob], losses(result, result.start)[0]
        shown.add(begin[0])
        if math.isfinite(begin[1]):
            axes.plot(*begin, "o", color=OTHER, markerfacecolor="white")
            axes.annotate("start", begin, (0, -8), textcoords="offset points", ha="center", va="top", fontsize="small")
    axes.set_xscale("log", base=2)
    ticks = sorted(shown)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], rotation=90 if len(ticks) > 6 else 0, fontsize="small")
    axes.set_title(TITLES[knob], fontsize="medium", loc="left")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _line(axes: Axes, runs: list[Trial], knob: str, color: str, label: str) -> None:
    """Draw a line with its name at its right end, and a cross at the upper edge for each run that diverged."""
    finite = [(getattr(trial, knob), trial.loss) for trial in runs if math.isfinite(trial.loss)]
    if finite:
        axes.plot(*zip(*finite, strict=True), ".-", color=color, linewidth=1.5)
        above = (3, 5)
        axes.annotate(
            label, finite[-1], above, textcoords="offset points", ha="right", va="bottom", color=color, fontsize="small"
        )
    for trial in runs:
        if math.isinf(trial.loss):
            axes.plot(getattr(trial, knob), 0.97, "x", color=color, transform=axes.get_xaxis_transform())
