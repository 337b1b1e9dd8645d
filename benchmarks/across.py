"""What several texts say together: how each method differs on every one of them, and what to expect of another.

python benchmarks/across.py docs/evidence/convergence-2m-*.json
python benchmarks/across.py docs/evidence/convergence-2m-*.json --check benchmarks/results/convergence-2m-mine.json

Every file is a result of convergence.py, on a text of its own. A text is one observation, the mean of its seeds: what
differs between texts is far more than what differs between seeds. The interval is that of one further text, and the
last column says how it did so far: each text held against the interval of all others.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import NamedTuple

from evidence.intervals import prediction
from evidence.report import Comparison
from rich.console import Console

REFERENCES = ("AdamW", "Muon")


class Quantity(NamedTuple):
    """One row of the table.

    Attributes:
        label: As printed.
        names: Methods that a comparison must have.
        values: Of a comparison, one per seed; None where a seed has none.
        form: Of a number.
    """

    label: str
    names: set[str]
    values: Callable[[Comparison], list[float | None]]
    form: str

    def of(self, comparison: Comparison) -> list[float] | None:
        """Return the value of every seed, None unless there is one for each."""
        if not self.names <= comparison.methods.keys():
            return None
        values = self.values(comparison)
        return None if None in values else [value for value in values if value is not None]


def read(file: Path) -> Comparison:
    """Return the comparison in a result of convergence.py."""
    record = json.loads(file.read_text())
    return Comparison(**{field.name: record[field.name] for field in fields(Comparison)})


def quantities(names: Sequence[str]) -> list[Quantity]:
    """Return differences from every reference, and the steps to AdamW's final loss."""
    rows = [
        Quantity(
            f"{name}: loss minus {reference}'s",
            {name, reference},
            partial(Comparison.differences, name=name, reference=reference),
            "{:+.4f}",
        )
        for reference in REFERENCES
        for name in names
        if name != reference
    ]
    return rows + [
        Quantity(
            f"{name}: steps to AdamW's final loss",
            {name, "AdamW"},
            partial(Comparison.saved_steps, name=name),
            "{:+.1%}",
        )
        for name in names
        if name != "AdamW"
    ]


def markdown(comparisons: Sequence[Comparison], checked: Sequence[Comparison] = ()) -> str:
    """Return the table: a row per quantity, a column per text, and the interval for another text.

    Args:
        comparisons: One per text, two at least; methods that all of them have.
        checked: Further ones: whether the mean of each lies in the interval.
    """
    titles = [each.text for each in comparisons]
    titles += ["another text, 95 %", "left out in turn, inside", *(f"{each.text}: inside?" for each in checked)]
    lines = [f"| | {' | '.join(titles)} |", "| --- |" + " --- |" * len(titles)]
    for row in quantities(list(comparisons[0].methods)):
        samples = [row.of(each) for each in comparisons]
        means = [statistics.fmean(values) for values in samples if values is not None]
        if len(means) < len(samples):
            continue
        expected = prediction(means, 1)
        cells = [row.form.format(mean) for mean in means]
        cells.append(f"{row.form.format(expected.low)} to {row.form.format(expected.high)}")
        others = [prediction(means[:place] + means[place + 1 :], 1) for place in range(len(means))]
        inside = sum(other.low <= mean <= other.high for other, mean in zip(others, means, strict=True))
        cells.append(f"{inside} of {len(means)}" if len(means) > 2 else "")
        for each in checked:
            values = row.of(each)
            mean = statistics.fmean(values) if values else None
            found = mean is not None and expected.low <= mean <= expected.high
            cells.append("" if mean is None else f"{row.form.format(mean)}, {'yes' if found else 'no'}")
        lines.append(f"| {row.label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print the table that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="results of convergence.py, one per text")
    parser.add_argument("--check", type=Path, nargs="*", default=[], help="further results, held against the interval")
    args = parser.parse_args()
    if len(args.files) < 2:
        parser.error("an interval over texts needs at least two of them")
    for file in [*args.files, *args.check]:
        if not file.is_file():
            parser.error(f"{file}: no such file")
    table = markdown([read(file) for file in args.files], [read(file) for file in args.check])
    Console().print(table, markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
