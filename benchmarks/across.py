"""What several texts say together: how each method differs on every one of them, and what to expect of another.

python benchmarks/across.py docs/evidence/convergence-2m-*.json
python benchmarks/across.py docs/evidence/convergence-2m-*.json --check benchmarks/results/convergence-2m-mine.json

Every file is a result of convergence.py. The interval is that of one further run, from all seeds on all texts: it holds
what differs between seeds and what differs between these texts. The mean of several seeds on another text should lie
inside, unless that text is unlike all of these.
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
    """Return the table: a row per method and quantity, a column per text, and the interval for another run.

    Args:
        comparisons: That the interval is made of.
        checked: Further ones: whether the mean of each lies in the interval.
    """
    texts = [each.text for each in comparisons]
    lines = [
        f"| | {' | '.join(texts)} | one more run, 95 % |" + "".join(f" {each.text}: inside? |" for each in checked),
        "| --- |" + " --- |" * (len(texts) + 1 + len(checked)),
    ]
    for row in quantities(list(comparisons[0].methods)):
        found = [row.of(each) for each in comparisons]
        samples = [values for values in found if values is not None]
        if len(samples) < len(found):
            continue
        expected = prediction([value for values in samples for value in values], 1)
        cells = [row.form.format(statistics.fmean(values)) for values in samples]
        cells.append(f"{row.form.format(expected.low)} to {row.form.format(expected.high)}")
        for each in checked:
            values = row.of(each)
            mean = statistics.fmean(values) if values else None
            inside = mean is not None and expected.low <= mean <= expected.high
            cells.append("" if mean is None else f"{row.form.format(mean)}, {'yes' if inside else 'no'}")
        lines.append(f"| {row.label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print the table that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="results of convergence.py, one per text")
    parser.add_argument("--check", type=Path, nargs="*", default=[], help="further results, held against the interval")
    args = parser.parse_args()
    for file in [*args.files, *args.check]:
        if not file.is_file():
            parser.error(f"{file}: no such file")
    table = markdown([read(file) for file in args.files], [read(file) for file in args.check])
    Console().print(table, markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
