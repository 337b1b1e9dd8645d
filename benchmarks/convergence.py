"""Tune AdamW, Muon, NorMuon and variants on equal terms, train each at its optimum with several seeds, compare.

python benchmarks/convergence.py                                    # 2M parameters, an hour on two cores
python benchmarks/convergence.py --size 10m --only "^AdamW$|^Muon$|^NorMuon$"
python benchmarks/convergence.py --tuned docs/evidence/tuned-2m.json --text my_corpus/ --seeds 101 102 103 104 105

Every finished run is a line of the results file: an interrupted benchmark goes on where it stopped, and more seeds or
methods are added to what is there.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from evidence.ledger import Ledger
from evidence.methods import METHODS, Method
from evidence.pool import Pool, Task
from evidence.report import Comparison, write_report
from evidence.sizes import SIZES, Size
from evidence.texts import NAMED, tokenized
from evidence.timing import time_steps
from evidence.training import Run, train
from evidence.tuning import BUDGET, DECAYS, Point, best_of, tune
from machine import describe_machine
from rich.console import Console
from settings import bf16_is_fast

# Where the search begins, for every method, in units of its own convention (Method.unit).
START = 4e-3
TUNING_SEED = 0
EVALUATIONS = 12
FOLDER = Path(__file__).parent / "results"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the arguments of a command line; end with a message where they cannot be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="2m", help="of the model; 124m needs a GPU")
    parser.add_argument(
        "--text", nargs="+", default=["python"], help=f"files and folders, or one of {', '.join(NAMED)} (python)"
    )
    parser.add_argument("--only", default="", metavar="REGEX", help="methods to compare, by name")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="of the runs at the optimum")
    parser.add_argument("--tuned", type=Path, metavar="FILE", help="take the rates from this file and tune nothing")
    parser.add_argument("--steps", type=int, help="optimizer steps of a run; the size's own if absent")
    parser.add_argument("--budget", type=int, default=BUDGET, help="tuning runs of every method")
    parser.add_argument("--workers", type=int, default=default_workers(), help="runs at once, one thread each")
    parser.add_argument("--no-timing", action="store_true", help="leave out the time of a step")
    parser.add_argument("--results", type=Path, help="file of results; benchmarks/results/convergence-SIZE.jsonl")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the report")
    args = parser.parse_args(arguments)
    if TUNING_SEED in args.seeds:
        parser.error(f"seed {TUNING_SEED} is the tuning's: runs at the optimum with it would flatter what was tuned")
    if len(set(args.seeds)) < 2 or len(set(args.seeds)) < len(args.seeds):
        parser.error("--seeds takes at least two different numbers: one run has no interval")
    if min(args.workers, args.budget, args.steps or 10) < 1 or (args.steps or 10) < 10:
        parser.error("--workers and --budget begin at 1, --steps at 10")
    if not any(re.search(args.only, method.name) for method in METHODS):
        parser.error(f"--only {args.only!r} names none of {[method.name for method in METHODS]}")
    if args.tuned and not args.tuned.is_file():
        parser.error(f"--tuned {args.tuned}: no such file")
    args.results = args.results or FOLDER / f"convergence-{args.size}.jsonl"
    return args


def default_workers() -> int:
    """Return one worker per core, one in all where a GPU does the work."""
    return 1 if torch.cuda.is_available() else len(os.sched_getaffinity(0))


def run_at(point: Point, method: Method, run: Run) -> Run:
    """Return ``run`` with the rates of ``method`` at a point of the grid."""
    lr, adamw_lr = START * 2.0**point.lr * method.unit(run.width), START * 2.0**point.adamw_lr
    lr, adamw_lr = (float(f"{rate:.3g}") for rate in (lr, adamw_lr))
    return replace(run, method=method.name, lr=lr, adamw_lr=adamw_lr, weight_decay=DECAYS[point.decay])


def compare(method: Method, base: Run, seeds: Sequence[int], ledger: Ledger, settings: Any, budget: int) -> Task[Any]:
    """Tune one method unless ``settings`` has its rates, then train at the optimum; see ``Pool``.

    Returns:
        Rates, the tuning runs with their losses, and the runs at the optimum.
    """
    tried: list[tuple[Run, float]] = []
    if settings is None:
        search = tune(Point(), budget)
        losses: dict[Point, float] = {}
        wanted = next(search)
        while True:
            runs = [run_at(point, method, base) for point in wanted]
            yield runs
            found = [ledger[run]["losses"][str(base.steps)] for run in runs]
            losses |= dict(zip(wanted, found, strict=True))
            tried += zip(runs, found, strict=True)
            try:
                wanted = search.send(losses)
            except StopIteration:
                break
        best = run_at(best_of(losses), method, base)
        settings = {key: getattr(best, key) for key in ("lr", "adamw_lr", "weight_decay")}
        settings["runs"] = len(losses)
    final = [
        replace(
            base,
            method=method.name,
            seed=seed,
            evaluations=EVALUATIONS,
            **{key: settings[key] for key in ("lr", "adamw_lr", "weight_decay")},
        )
        for seed in seeds
    ]
    yield final
    return {
        "settings": settings,
        "tried": [{**asdict(run), "loss": loss} for run, loss in tried],
        "curves": [ledger[run]["losses"] for run in final],
    }


def base_run(size: Size, text: Path) -> Run:
    """Return what all runs have in common; the method and its rates stand open."""
    precision = "bfloat16" if bf16_is_fast() else "float32"
    return Run(
        text.name, **asdict(size), method="", lr=0, adamw_lr=0, weight_decay=0, seed=TUNING_SEED, precision=precision
    )


def main() -> None:
    """Run the benchmark that the command line asks for."""
    args = parse_arguments()
    console = Console()
    if args.size == "124m" and not torch.cuda.is_available():
        console.print("skipped: 124 million parameters need a GPU, and torch finds none")
        return
    size = replace(SIZES[args.size], steps=args.steps or SIZES[args.size].steps)
    cache = args.results.parent / "cache"
    console.print(f"reading {' '.join(args.text)}")
    base = base_run(size, tokenized(args.text, size.vocabulary, cache))
    methods = [method for method in METHODS if re.search(args.only, method.name)]
    tuned = json.loads(args.tuned.read_text())["methods"] if args.tuned else None
    if tuned is not None and (missing := [method.name for method in methods if method.name not in tuned]):
        sys.exit(f"{args.tuned} has no rates for {missing}; leave them out with --only")
    ledger = Ledger(args.results)
    pool = Pool(train, ledger, cache, args.workers)
    tasks = [
        compare(method, base, args.seeds, ledger, tuned[method.name] if tuned else None, args.budget)
        for method in methods
    ]
    expected = len(methods) * (len(args.seeds) + (0 if tuned else args.budget))
    found = pool.carry_out(tasks, f"{args.size}, {' '.join(args.text)}", expected)
    pool.close()
    comparison = Comparison(
        command=shlex.join(["python", *sys.argv]),
        text=" ".join(args.text),
        size=args.size,
        base=asdict(base),
        seeds=args.seeds,
        machine=describe_machine(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        methods={method.name: result for method, result in zip(methods, found, strict=True)},
        seconds=None if args.no_timing else time_steps(methods, base, cache),
    )
    for file in write_report(comparison, args.out, console):
        console.print(f"wrote {file}")


if __name__ == "__main__":
    main()
