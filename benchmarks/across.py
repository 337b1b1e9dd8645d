"""What several texts say together: how each method differs on every one of them, and what to expect of another.

python benchmarks/across.py docs/evidence/convergence-2m-*.json
python benchmarks/across.py docs/evidence/convergence-2m-*.json --check benchmarks/results/convergence-2m-mine.json

Every file is a result of convergence.py. The interval for another text treats the texts as a sample of texts, so it
holds what differs between texts beside what differs between seeds; from few texts it is wide.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from evidence.intervals import Interval, prediction
from evidence.report import Comparison
from rich.console import Console

REFERENCES = ("AdamW", "Muon")


def read(file: Path) -> Comparison:
    """Return the comparison in a result of convergence.py."""
    record = json.loads(file.read_text())
    return Comparison(**{field.name: record[field.name] for field in fields(Comparison)})


def shares(comparison: Comparison, name: str) -> float | None:
    """Return the mean share of steps saved, None where some seed did not reach AdamW's final loss."""
    saved = comparison.saved_steps(name)
    return None if None in saved else statistics.fmean(share for share in saved if share is not None)


def markdown(comparisons: Sequence[Comparison], checked: Sequence[Comparison] = ()) -> str:
    """Return the table: a row per method and quantity, a column per text, and the interval for another text.

    Args:
        comparisons: That the interval is made of; methods that all of them have.
        checked: Further ones: whether their value lies in the interval.
    """
    common = [name for name in comparisons[0].methods if all(name in each.methods for each in comparisons)]
    quantities = []
    for reference in REFERENCES:
        for name in common:
            if name != reference and reference in common:
                quantities.append(
                    (
                        f"{name}: loss minus {reference}'s",
                        lambda each, name=name, reference=reference: (
                            statistics.fmean(each.differences(name, reference))
                            if {name, reference} <= each.methods.keys()
                            else None
                        ),
                        "{:+.4f}",
                    )
                )
    quantities += [
        (
            f"{name}: steps to AdamW's final loss",
            lambda each, name=name: shares(each, name) if {name, "AdamW"} <= each.methods.keys() else None,
            "{:+.1%}",
        )
        for name in common
        if name != "AdamW" and "AdamW" in common
    ]
    texts = [each.text for each in comparisons]
    lines = [
        f"| | {' | '.join(texts)} | another text, 95 % |" + "".join(f" {each.text}: inside? |" for each in checked),
        "| --- |" + " --- |" * (len(texts) + 1 + len(checked)),
    ]
    for label, value, form in quantities:
        values = [value(each) for each in comparisons]
        if any(found is None for found in values):
            continue
        expected: Interval = prediction([found for found in values if found is not None], 1)
        cells = [form.format(found) for found in values]
        cells.append(f"{form.format(expected.low)} to {form.format(expected.high)}")
        for each in checked:
            found = value(each)
            inside = found is not None and expected.low <= found <= expected.high
            cells.append("" if found is None else f"{form.format(found)}, {'yes' if inside else 'no'}")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print the table that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="results of convergence.py, one per text")
    parser.add_argument("--check", type=Path, nargs="*", default=[], help="further results, held against the interval")
    args = parser.parse_args()
    if len(args.files) < 2:
        parser.error("an interval over texts needs at least two of them")
    table = markdown([read(file) for file in args.files], [read(file) for file in args.check])
    Console().print(table, markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
