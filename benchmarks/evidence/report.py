"""Tables, plots and files of a comparison."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from compare_optimizers import steps_to_reach
from matplotlib.axes import Axes
from rich.console import Console

from evidence.intervals import Interval, confidence, holm, paired_p, prediction
from evidence.timing import step_ratios
from evidence.training import RATES

# Against whom differences are given, where they take part.
REFERENCES = ("AdamW", "Muon", "NorMuon")
# Ten colours, then the same ten in a lighter tone.
PALETTE = matplotlib.color_sequences["tab20"][::2] + matplotlib.color_sequences["tab20"][1::2]
# Seeds of a rerun for which the prediction interval is given.
FRESH_SEEDS = 5


@dataclass(frozen=True)
class Comparison:
    """What a run of the benchmark found.

    Attributes:
        command: That made it.
        text: As given on the command line.
        size: Name of the model.
        base: The run that all others differ from.
        seeds: Of the runs at the optimum.
        machine: Where.
        methods: For each, ``settings``, ``tried`` (the tuning runs) and ``curves`` (losses by step, by seed).
        seconds: See ``time_steps``; None if not measured.
    """

    command: str
    text: str
    size: str
    base: dict[str, Any]
    seeds: Sequence[int]
    machine: dict[str, Any]
    methods: dict[str, Any]
    seconds: dict[str, Any] | None

    @property
    def steps(self) -> int:
        """Optimizer steps of a run."""
        return int(self.base["steps"])

    def finals(self, name: str) -> list[float]:
        """Return the final validation loss of every seed."""
        return [curve[str(self.steps)] for curve in self.methods[name]["curves"]]

    def differences(self, name: str, reference: str) -> list[float]:
        """Return how much higher the final loss is than that of ``reference``, seed by seed."""
        return [a - b for a, b in zip(self.finals(name), self.finals(reference), strict=True)]

    def saved_steps(self, name: str) -> list[float | None]:
        """Return the share of steps to AdamW's final loss, less one, by seed; None where it was not reached."""
        shares = []
        for curve, target in zip(self.methods[name]["curves"], self.finals("AdamW"), strict=True):
            reached = steps_to_reach({int(step): loss for step, loss in curve.items()}, target)
            shares.append(None if reached is None else reached / self.steps - 1)
        return shares


def summarize(comparison: Comparison) -> dict[str, Any]:
    """Return the numbers of the tables: by method, and the paired differences by reference."""
    ratios = step_ratios(comparison.seconds, "AdamW") if comparison.seconds and "AdamW" in comparison.seconds else {}
    rows = {}
    for name, found in comparison.methods.items():
        finals = comparison.finals(name)
        row: dict[str, Any] = {"settings": found["settings"], "loss": confidence(finals), "losses": finals}
        row["loss_of_new_seeds"] = prediction(finals, FRESH_SEEDS)
        if "AdamW" in comparison.methods:
            saved = comparison.saved_steps(name)
            row["reached"] = sum(share is not None for share in saved)
            row["saved_steps"] = (
                confidence([share for share in saved if share is not None]) if row["reached"] == len(saved) else None
            )
        row["step_ratio"] = ratios.get(name)
        rows[name] = row
    return {"methods": rows, "differences": _all_differences(comparison)}


def _all_differences(comparison: Comparison) -> dict[str, Any]:
    """Return the paired difference of every method from each reference, its test, and what new seeds would show."""
    found: dict[str, Any] = {}
    for reference in REFERENCES:
        others = [name for name in comparison.methods if name != reference]
        if reference not in comparison.methods or not others:
            continue
        tests = [paired_p(comparison.finals(name), comparison.finals(reference)) for name in others]
        found[reference] = {}
        for name, p, adjusted in zip(others, tests, holm(tests), strict=True):
            differences = comparison.differences(name, reference)
            found[reference][name] = {
                "difference": confidence(differences),
                "of_new_seeds": prediction(differences, FRESH_SEEDS),
                "better": sum(difference < 0 for difference in differences),
                "p": p,
                "p_holm": adjusted,
            }
    return found


def markdown(comparison: Comparison, summary: dict[str, Any]) -> str:
    """Return the tables as Markdown."""
    seeds = len(comparison.seeds)
    lines = [
        f"{comparison.size}, text: {comparison.text}, {comparison.steps} steps, {seeds} seeds."
        f" Brackets: 95 % intervals over seeds.",
        "",
        "| method | lr | adamw_lr | weight decay | tuning runs | validation loss | steps to AdamW's final loss |"
        " time of a step | time to that loss |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in summary["methods"].items():
        settings = row["settings"]
        saved, ratio = row.get("saved_steps"), row["step_ratio"]
        if name == "AdamW":
            share = "0 %"
        elif "AdamW" not in comparison.methods:
            share = ""
        elif saved is None:
            share = f"reached by {row.get('reached', 0)} of {seeds}"
        else:
            share = f"{saved.shown(1, 100, '+')} %"
        together = f"{(1 + saved.mean) * ratio:.2f}" if saved is not None and ratio else ""
        lines.append(
            f"| {name} | {settings['lr']:g} | {settings['adamw_lr']:g} | {settings['weight_decay']:g} |"
            f" {settings['runs']} | {row['loss'].shown()} | {share} | {f'{ratio:.2f}' if ratio else ''} | {together} |"
        )
    for reference, others in summary["differences"].items():
        lines += [
            "",
            f"| loss minus {reference}'s, seed by seed | mean | of five new seeds | better in | p | p, Holm |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for name, row in others.items():
            expected: Interval = row["of_new_seeds"]
            lines.append(
                f"| {name} | {row['difference'].shown(4, 1, '+')} | {expected.low:+.4f} to {expected.high:+.4f} |"
                f" {row['better']} of {seeds} | {row['p']:.2g} | {row['p_holm']:.2g} |"
            )
    return "\n".join(lines) + "\n"


def _colors(comparison: Comparison) -> dict[str, Any]:
    """Return the colour of every method, the same in all figures."""
    return dict(zip(comparison.methods, cycle(PALETTE), strict=False))


def draw_curves(comparison: Comparison, file: Path) -> None:
    """Draw mean losses by step, their differences from AdamW's by seed, and where they end, all with intervals."""
    figure, (curves, apart, ends) = plt.subplots(1, 3, figsize=(17, 5), layout="constrained")
    reference = comparison.methods.get("AdamW", {}).get("curves")
    names = list(comparison.methods)
    for place, (name, color) in zip(range(len(names), 0, -1), _colors(comparison).items(), strict=True):
        found = comparison.methods[name]["curves"]
        steps = list(found[0])
        _band(curves, steps, [[curve[step] for curve in found] for step in steps], color, name)
        if reference is not None and name != "AdamW":
            pairs = [
                [ours[step] - theirs[step] for ours, theirs in zip(found, reference, strict=True)] for step in steps
            ]
            _band(apart, steps, pairs, color, name)
        mean, low, high = confidence(comparison.finals(name))
        ends.errorbar(mean, place, xerr=[[mean - low], [high - mean]], fmt="o", color=color, capsize=3)
    curves.set_ylabel("validation loss (nats per token)")
    curves.legend(fontsize="small")
    apart.set_ylabel("validation loss minus AdamW's at the same step")
    apart.axhline(0.0, color="C0", linestyle="--", linewidth=1.2)
    if reference is not None:  # the first steps differ by more than anything later
        settled = [step for step in steps if int(step) > comparison.steps / 4]
        heights = [
            ours[step] - theirs[step]
            for found in comparison.methods.values()
            for ours, theirs in zip(found["curves"], reference, strict=True)
            for step in settled
        ]
        apart.set_ylim(min(heights) - 0.02, max(heights) + 0.02)
    for axes in (curves, apart):
        axes.set_xlabel("optimizer step")
    ends.set_yticks(range(len(names), 0, -1), names)
    ends.set_xlabel("final validation loss")
    seeds = len(comparison.seeds)
    words = f"{comparison.size}, text: {comparison.text}, {comparison.steps} steps"
    figure.suptitle(f"{words}; means and 95 % intervals of {seeds} seeds")
    figure.savefig(file, dpi=100)
    plt.close(figure)


def _band(axes: Axes, steps: Sequence[str], values: Sequence[Sequence[float]], color: Any, label: str) -> None:
    """Draw the mean of the values at each step, and its interval."""
    places, bands = [int(step) for step in steps], [confidence(each) for each in values]
    style = "--" if label == "AdamW" else "-"
    axes.plot(places, [band.mean for band in bands], style, color=color, label=label, linewidth=1.2)
    axes.fill_between(places, [band.low for band in bands], [band.high for band in bands], color=color, alpha=0.12)


def draw_grids(comparison: Comparison, file: Path) -> None:
    """Draw, for every method and knob, the best loss that was found at each of its values."""
    names, colors = [name for name, found in comparison.methods.items() if found["tried"]], _colors(comparison)
    figure, rows = plt.subplots(1, len(RATES), figsize=(13, 4.5), sharey=True, layout="constrained", squeeze=False)
    for knob, axes in zip(RATES, rows[0], strict=True):
        for name in names:
            best: dict[float, float] = {}
            for run in comparison.methods[name]["tried"]:
                best[run[knob]] = min(best.get(run[knob], math.inf), run["loss"])
            values = sorted(best)
            axes.plot(values, [best[value] for value in values], marker=".", color=colors[name], label=name)
        if knob == "weight_decay":
            axes.set_xscale("symlog", linthresh=0.1)  # zero is on the grid
        else:
            axes.set_xscale("log", base=2)
        axes.set_xlabel(knob)
    floor = min(run["loss"] for name in names for run in comparison.methods[name]["tried"])
    rows[0][0].set_ylim(floor - 0.03, floor + 0.4)
    rows[0][0].set_ylabel("final validation loss, best of the other knobs")
    rows[0][-1].legend(fontsize="x-small")
    figure.suptitle(f"Tuning runs, {comparison.size}, text: {comparison.text}, one seed")
    figure.savefig(file, dpi=120)
    plt.close(figure)


def write_report(comparison: Comparison, folder: Path, console: Console) -> list[Path]:
    """Print the tables; write them with all numbers, the plots, and the tuned rates; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    summary = summarize(comparison)
    tables = markdown(comparison, summary)
    console.print(tables, markup=False, soft_wrap=True)
    stem = f"convergence-{comparison.size}-{_file_word(comparison.text)}"
    files = [folder / f"{stem}{suffix}" for suffix in (".md", ".json", ".png")]
    files[0].write_text(tables)
    files[1].write_text(json.dumps({**asdict(comparison), "summary": summary}, indent=1))
    draw_curves(comparison, files[2])
    if any(found["tried"] for found in comparison.methods.values()):
        files += [
            folder / f"grid-{comparison.size}-{_file_word(comparison.text)}.png",
            folder / f"tuned-{comparison.size}.json",
        ]
        draw_grids(comparison, files[3])
        rates = {name: found["settings"] for name, found in comparison.methods.items()}
        record = {
            "size": comparison.size,
            "width": comparison.base["width"],
            "text": comparison.text,
            "steps": comparison.steps,
            "methods": rates,
        }
        files[4].write_text(json.dumps(record, indent=1) + "\n")
    return files


def _file_word(text: str) -> str:
    """Return a name for files from the words of ``--text``."""
    return "-".join(Path(word).stem for word in text.split())[:40] or "text"
