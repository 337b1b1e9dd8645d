"""What comes of replacing AdamW at its own learning rate: tables and a picture."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from evidence.intervals import confidence, paired_p
from evidence.one_rate import ADAMW, TWICE

# Multiples of AdamW's best learning rate, where every method was run.
MULTIPLES = {"half": 0.5, "same": 1.0, "twice": 2.0}
# name of a method without its LoRA policy -> colour, width
STYLES = {ADAMW: ("0.25", 1.6), "NorMuon, fixed size": ("#5fa8d3", 1.6), "NorMuon": ("#c1121f", 2.2)}
STYLES[TWICE] = ("#e79aa0", 1.6)
DASHES = {"": "-", "adamw": ":", "normuon": "-", "b": "--"}


@dataclass(frozen=True)
class Comparison:
    """What was found for one model and one task.

    Attributes:
        model: Its name.
        task: Its name.
        title: The task in words.
        lora: Whether LoRA was trained, and not all weights.
        steps: Of a run.
        seeds: Of every rate.
        methods: For each, what ``rate_search.compare`` returned.
    """

    model: str
    task: str
    title: str
    lora: bool
    steps: int
    seeds: Sequence[int]
    methods: Sequence[dict[str, Any]]

    @property
    def name(self) -> str:
        """The comparison in a few words."""
        return f"{Path(self.model).name}, {self.task}{', LoRA' if self.lora else ''}"

    @property
    def reference(self) -> dict[str, Any]:
        """What was found for AdamW."""
        return next(found for found in self.methods if found["method"] == ADAMW)


def losses_at(found: dict[str, Any], lr: float) -> list[float] | None:
    """Return the losses of all seeds at a learning rate, None where the method was not run."""
    for rate in found["rates"]:
        if math.isclose(rate["lr"], lr):
            losses: list[float] = rate["loss"]
            return losses
    return None


def summarize(comparison: Comparison) -> list[dict[str, Any]]:
    """Return a row per method: differences from AdamW at the same rate, and at each one's best rate, by seed."""
    theirs, best = comparison.reference, comparison.reference["lr"]
    rows = []
    for found in comparison.methods:
        ours, reference = losses_at(found, found["lr"]), losses_at(theirs, best)
        row: dict[str, Any] = {"method": found["method"], "lr": found["lr"], "loss": confidence(ours)}
        for name, multiple in MULTIPLES.items():
            pair = [losses_at(each, best * multiple) for each in (found, theirs)]
            row[name] = _difference(*pair)
        row["own best"] = _difference(ours, reference)
        rows.append(row)
    return rows


def _difference(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Return the interval of the paired differences, their p-value, and how many seeds are better."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    better = sum(difference < 0 for difference in differences)
    return {"difference": confidence(differences), "better": better, "p": paired_p(ours, theirs)}


def markdown(comparison: Comparison) -> str:
    """Return the table of one comparison."""
    best, count = comparison.reference["lr"], len(comparison.seeds)
    rates = " | ".join(f"at {best * multiple:g} ({name})" for name, multiple in MULTIPLES.items())
    lines = [
        f"{comparison.name} ({comparison.title}), {comparison.steps} steps, {count} seeds. AdamW's best rate is"
        f" {best:g}. Differences are from AdamW at the same rate, the last one at each one's best; 95 % intervals.",
        "",
        f"| method | {rates} | own best lr | loss there | minus AdamW's at its best |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in summarize(comparison):
        cells = [""] * (len(MULTIPLES) + 1)
        if row["method"] != ADAMW:
            cells = [_shown(row[name], count) for name in (*MULTIPLES, "own best")]
        lines.append(
            f"| {row['method']} | {' | '.join(cells[:-1])} | {row['lr']:g} | {row['loss'].shown(3)} | {cells[-1]} |"
        )
    return "\n".join(lines) + "\n"


def _shown(found: dict[str, Any], count: int) -> str:
    return f"{found['difference'].shown(3, 1, '+')}, {found['better']} of {count}"


def draw(comparisons: Sequence[Comparison], file: Path) -> None:
    """Draw loss over learning rate, a panel for each comparison: means as lines, seeds as dots."""
    columns = 2 if len(comparisons) in (2, 4) else min(3, len(comparisons))
    rows = math.ceil(len(comparisons) / columns)
    size = (5.2 * columns, 4.2 * rows)
    figure, panels = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axes in panels.flat[len(comparisons) :]:
        axes.set_visible(False)
    for axes, comparison in zip(panels.flat, comparisons, strict=False):
        _draw_panel(axes, comparison)
    for axes in panels[:, 0]:
        axes.set_ylabel("held-out loss")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _draw_panel(axes: Axes, comparison: Comparison) -> None:
    best = comparison.reference["lr"]
    means: list[float] = []
    ends: list[tuple[float, float, str, str]] = []
    for found in comparison.methods:
        base, _, policy = found["method"].partition(", lora=")
        color, width = STYLES[base]
        finite = [rate for rate in found["rates"] if all(map(math.isfinite, rate["loss"]))]
        rates, lines = [rate["lr"] for rate in finite], [statistics.fmean(rate["loss"]) for rate in finite]
        axes.plot(rates, lines, DASHES[policy], color=color, linewidth=width)
        for rate in finite:
            axes.plot([rate["lr"]] * len(rate["loss"]), rate["loss"], ".", color=color, markersize=4, alpha=0.5)
        own = rates.index(found["lr"])
        axes.plot(rates[own], lines[own], "o", color=color, markersize=7)
        means += lines
        ends.append((rates[0], lines[0], _short(base, policy), color))
    floor = min(means)
    inside = [mean for found in comparison.methods for mean in _means_near(found, best)]
    top = max(inside) + 0.15 * (max(inside) - floor)
    axes.set_ylim(floor - 0.12 * (top - floor), top)
    axes.set_xscale("log", base=2)
    ticks = sorted({rate["lr"] for found in comparison.methods for rate in found["rates"]})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=8)
    axes.minorticks_off()
    axes.axvline(best, color="0.25", linestyle=(0, (1, 2)), linewidth=1)
    axes.annotate("AdamW's best", (best, top), (3, -3), textcoords="offset points", va="top", fontsize=8, color="0.25")
    # room for the labels on the left: a letter is about 1.6 % of the width of a panel
    share = 0.03 + 0.016 * max(len(name) for _, _, name, _ in ends)
    axes.set_xlim(ticks[0] / (1.15 * ticks[-1] / ticks[0]) ** (share / (1 - share)), 1.15 * ticks[-1])
    axes.set_title(f"{comparison.name}: {comparison.title}", fontsize=10)
    axes.set_xlabel(f"learning rate of everything ({comparison.steps} steps)")
    _label(axes, ends, floor, top)
    axes.spines[["top", "right"]].set_visible(False)


def _short(base: str, policy: str) -> str:
    """Return the label of a method: under LoRA, the size of its step and the policy."""
    return f"{base.removeprefix('NorMuon, ')}, {policy}" if policy else base


def _means_near(found: dict[str, Any], best: float) -> list[float]:
    """Return the mean losses at ``MULTIPLES`` of a rate."""
    several = [losses_at(found, best * multiple) for multiple in MULTIPLES.values()]
    return [statistics.fmean(losses) for losses in several if losses and all(map(math.isfinite, losses))]


def _label(axes: Axes, ends: Sequence[tuple[float, float, str, str]], floor: float, top: float) -> None:
    """Write each method beside the left end of its curve, so far apart that both can be read."""
    height, last = 0.065 * (top - floor), -math.inf
    for rate, loss, name, color in sorted(ends, key=lambda end: end[1]):
        last = max(min(loss, top - height), last + height)
        axes.annotate(
            name, (rate, last), (-6, 0), textcoords="offset points", ha="right", va="center", color=color, fontsize=9
        )


def write_report(comparisons: Sequence[Comparison], record: dict[str, Any], folder: Path, stem: str) -> list[Path]:
    """Write the tables, all numbers and the picture; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{stem}{suffix}" for suffix in (".md", ".json", ".png")]
    files[0].write_text("\n".join(map(markdown, comparisons)))
    found = [{**asdict(comparison), "summary": summarize(comparison)} for comparison in comparisons]
    files[1].write_text(json.dumps({**record, "comparisons": found}, indent=1))
    draw(comparisons, files[2])
    return files
