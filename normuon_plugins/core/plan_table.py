"""The rows of a plan, and the table a person reads: repeated layers folded, shares at the end."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

# Characters of a layout that the table shows; to_dict gives all.
LONGEST_LAYOUT = 40
WHICH_RATE = (
    "Take lr from AdamW: build_normuon and the adapters size each step by it (adjust_lr_fn='match_progress_adamw')."
)
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


@dataclass(frozen=True)
class PlannedParameter:
    """One row of the plan.

    Attributes:
        name: FQN, as ``named_parameters()`` gives it; tied weights appear once, under the first name.
        shape: Of the whole parameter.
        algorithm: ``"normuon"`` or ``"adamw"``.
        layout: Layout string of a matrix parameter, else None.
        decay: Whether weight decay applies: ``weight_decay`` to matrices, ``adamw_weight_decay`` to the rest.
        reason: Why, in a phrase.
        parameter: The parameter itself.
    """

    name: str
    shape: tuple[int, ...]
    algorithm: str
    layout: str | None
    decay: bool
    reason: str
    parameter: Tensor = field(repr=False)

    @property
    def group_name(self) -> str:
        """Name of the parameter group it belongs to."""
        if self.layout is not None:
            return f"normuon_{self.layout.replace(' ', '_')}"
        return "adamw" if self.decay else "adamw_no_decay"


def format_plan(rows: Sequence[PlannedParameter]) -> str:
    """Return the table: a line per kind of parameter, counts and shares per algorithm, and which learning rate fits."""
    lines: list[tuple[str, ...]] = [("parameter", "shape", "algorithm", "layout", "decay", "reason")]
    lines += fold_rows((row.name, *_cells(row)) for row in rows)
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]) - 1)]
    table = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[-1]]) for line in lines
    ]
    table.insert(1, "-" * max(map(len, table)))
    return "\n".join([*table, "", *_shares(rows), "", WHICH_RATE])


def fold_rows(rows: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Return ``rows``, with one in place of those that differ in the numbers in their first entry, a name, only."""
    kinds: dict[tuple[str, ...], list[str]] = {}
    for name, *cells in rows:
        kinds.setdefault((_NUMBER.sub("{}", name), *cells), []).append(name)
    return [(name, *kind[1:]) for kind, names in kinds.items() for name in fold_names(names)]


def _cells(row: PlannedParameter) -> tuple[str, ...]:
    size = " x ".join(map(str, row.shape)) or "scalar"
    option = "weight_decay" if row.algorithm == "normuon" else "adamw_weight_decay"
    layout = row.layout or "-"
    if len(layout) > LONGEST_LAYOUT:  # heads of unequal sizes, one by one
        layout = f"{layout[: LONGEST_LAYOUT // 2]}...{layout[-LONGEST_LAYOUT // 2 :]}"
    reason = row.reason if row.parameter.requires_grad else f"{row.reason}; frozen now"
    return (size, row.algorithm, layout, option if row.decay else "none", reason)


def fold_names(names: Sequence[str]) -> list[str]:
    """Return ``["layers.{0-3}.weight"]`` for the four names it stands for.

    Args:
        names: Names that differ in their numeric parts only.

    Returns:
        Patterns that stand for exactly ``names``: two ranges in one pattern mean that every combination exists.
    """
    numbers = [tuple(int(number) for number in _NUMBER.findall(name)) for name in names]
    template = _NUMBER.sub("{}", names[0])
    return [template.format(*map(_ranges, axes)) for axes in _boxes(sorted(set(numbers)))]


def _boxes(points: Sequence[tuple[int, ...]]) -> list[list[list[int]]]:
    """Divide points into full boxes (a list of coordinates per axis), splitting along the first axis where needed."""
    axes = [sorted(set(coordinates)) for coordinates in zip(*points, strict=True)]
    if math.prod(map(len, axes)) == len(points):
        return [axes]
    tails: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for first in axes[0]:
        tail = tuple(point[1:] for point in points if point[0] == first)
        tails.setdefault(tail, []).append(first)
    return [[firsts, *box] for tail, firsts in tails.items() for box in _boxes(tail)]


def _ranges(numbers: Iterable[int]) -> str:
    """Return ``"{0-3,5}"`` for 0, 1, 2, 3, 5, and ``"4"`` for 4 alone."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    text = ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return text if text.isdigit() else f"{{{text}}}"


def _shares(rows: Sequence[PlannedParameter]) -> list[str]:
    """Return a line per algorithm, and one for what is frozen: how many tensors, how many numbers, which share."""
    parts = {kind: [row for row in rows if row.algorithm == kind] for kind in ("normuon", "adamw")}
    if frozen := [row for row in rows if not row.parameter.requires_grad]:
        parts["frozen"] = frozen  # counted above as well
    total = sum(math.prod(row.shape) for row in rows) or 1
    lines = []
    for name, part in parts.items():
        size = sum(math.prod(row.shape) for row in part)
        lines.append(f"{name:8} {len(part):6} tensors {size:16,} parameters {size / total:7.1%}")
    return lines
