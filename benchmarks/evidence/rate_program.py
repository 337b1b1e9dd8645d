"""What pretrained.py and pretraining.py have in common: arguments, the runs of all methods, the report."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from machine import describe_machine
from rich.console import Console

from evidence.ledger import Ledger
from evidence.one_rate import ADAMW, TWICE
from evidence.pool import Pool
from evidence.rate_report import Comparison, write_report
from evidence.rate_search import compare
from evidence.training import pick_device


def add_run_arguments(parser: argparse.ArgumentParser, *, name: str, steps: int, workers: int, folder: Path) -> None:
    """Add what every such program takes.

    Args:
        parser: Of the program.
        name: Of its files.
        steps: Default length of a run.
        workers: Default number of runs at once.
        folder: For the files.
    """
    parser.add_argument("--only", default="", metavar="REGEX", help="methods beside AdamW, by name")
    parser.add_argument("--twice", action="store_true", help=f"also {TWICE!r}")
    parser.add_argument("--steps", type=int, default=steps, help="of a run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--workers", type=int, default=workers, help="runs at once, one thread each")
    parser.add_argument("--results", type=Path, default=folder / f"{name}.jsonl", help="file of all runs")
    parser.add_argument("--out", type=Path, default=folder, help="folder of the report")
    parser.add_argument("--name", default=name, help="of the report's files")


def check_run_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with a message where the common arguments cannot be."""
    if len(set(args.seeds)) < 2 or len(set(args.seeds)) < len(args.seeds):
        parser.error("--seeds takes at least two different numbers: one run has no interval")
    if args.workers < 1 or args.steps < 1:
        parser.error("--workers and --steps begin at 1")


def chosen(methods: Iterable[str], args: argparse.Namespace) -> list[str]:
    """Return the methods that a command line asks for; AdamW is always among them."""
    return [name for name in methods if name == ADAMW or (re.search(args.only, name) and (args.twice or name != TWICE))]


def carry_out(
    args: argparse.Namespace,
    work: Callable[[Any, Path], Any],
    bases: Sequence[Any],
    methods: Sequence[str],
    description: str,
) -> list[list[Any]]:
    """Compare all methods on every base; return what ``compare`` found, a list for each base."""
    ledger = Ledger(args.results)
    pool = Pool(work, ledger, args.results.parent / "cache", args.workers)
    tasks = [compare(base, method, args.seeds, ledger) for base in bases for method in methods]
    results = pool.carry_out(tasks, description, len(bases) * (2 * len(methods) - 1) * 4 * len(args.seeds))
    pool.close()
    return [results[first : first + len(methods)] for first in range(0, len(results), len(methods))]


def report(comparisons: Sequence[Comparison], args: argparse.Namespace, console: Console, **more: Any) -> None:
    """Write and print the report; ``more`` is kept beside the command and the machine."""
    record = {"command": shlex.join(["python", *sys.argv]), "machine": describe_machine(pick_device()), **more}
    files = write_report(comparisons, record, args.out, args.name)
    console.print(files[0].read_text(), markup=False, soft_wrap=True)
    for file in files:
        console.print(f"wrote {file}")
