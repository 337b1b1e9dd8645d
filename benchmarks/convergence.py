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
from evidence.training import RATES, Run, pick_device, train
from evidence.tuning import BUDGET, DECAYS, KNOBS, Point, tune
from machine import describe_machine
from rich.console import Console
from settings import bf16_is_fast

# Where the search begins, for every method: hidden rate in units of its own convention (Method.unit), and the other.
START_LR, START_ADAMW_LR = 8e-3, 3.2e-2
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
    parser.add_argument(
        "--start", type=Path, metavar="FILE", help="begin to tune at the rates of this file, tuned for another size"
    )
    parser.add_argument("--steps", type=int, help="optimizer steps of a run; the size's own if absent")
    parser.add_argument("--budget", type=int, default=BUDGET, help="tuning runs of every method")
    parser.add_argument(
        "--knobs", nargs="+", choices=KNOBS, default=KNOBS, help="what is tuned; the rest stays at the start"
    )
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
    for file in (args.tuned, args.start):
        if file is not None and not file.is_file():
            parser.error(f"{file}: no such file")
    if args.tuned and args.start:
        parser.error("--tuned tunes nothing, and --start says where tuning begins: give one of them")
    args.results = args.results or FOLDER / f"convergence-{args.size}.jsonl"
    return args


def default_workers() -> int:
    """Return one worker per core, one in all where a GPU does the work."""
    return 1 if torch.cuda.is_available() else len(os.sched_getaffinity(0))


def starting_rates(method: Method, width: int, record: dict[str, Any] | None) -> dict[str, float]:
    """Return where the search for a method begins: common to all, or as tuned for another width.

    Args:
        method: Of the convention that its rate follows, see ``Method.unit``.
        width: Of the model.
        record: A file of tuned rates; None takes ``START_LR`` and ``START_ADAMW_LR``.
    """
    if record is None:
        return {"lr": START_LR * method.unit(width), "adamw_lr": START_ADAMW_LR, "weight_decay": DECAYS[1]}
    rates = record["methods"][method.name]
    return {**rates, "lr": rates["lr"] * method.unit(width) / method.unit(record["width"])}


def run_at(point: Point, start: dict[str, float], run: Run) -> Run:
    """Return ``run`` with the rates at a point of the grid around ``start``."""
    lr, adamw_lr = start["lr"] * 2.0**point.lr, start["adamw_lr"] * 2.0**point.adamw_lr
    lr, adamw_lr = (float(f"{rate:.3g}") for rate in (lr, adamw_lr))
    return replace(run, lr=lr, adamw_lr=adamw_lr, weight_decay=DECAYS[point.decay])


def search(
    base: Run, start: dict[str, float], ledger: Ledger, budget: int, knobs: Sequence[str]
) -> Task[tuple[Run, list[Any]]]:
    """Tune the method of ``base``; see ``Pool`` and ``tune``.

    Returns:
        The best run, and every run that was tried with its loss.
    """
    steps = tune(Point(decay=DECAYS.index(start["weight_decay"])), budget, knobs)
    losses: dict[Point, float] = {}
    wanted = next(steps)
    while True:
        yield [run_at(point, start, base) for point in wanted]
        losses |= {point: ledger[run_at(point, start, base)]["losses"][str(base.steps)] for point in wanted}
        try:
            wanted = steps.send(losses)
        except StopIteration as end:
            tried = [{**asdict(run_at(point, start, base)), "loss": loss} for point, loss in losses.items()]
            return run_at(end.value, start, base), tried


def compare(
    base: Run,
    seeds: Sequence[int],
    ledger: Ledger,
    *,
    tuned: Any,
    start: dict[str, float],
    budget: int,
    knobs: Sequence[str],
) -> Task[Any]:
    """Tune the method of ``base`` unless its rates are known, then train at the optimum; see ``Pool``.

    Returns:
        Rates, the tuning runs with their losses, and the loss curves of the runs at the optimum.
    """
    settings, tried = tuned, []
    if settings is None:
        best, tried = yield from search(base, start, ledger, budget, knobs)
        settings = {key: getattr(best, key) for key in RATES} | {"runs": len(tried)}
    rates = {key: settings[key] for key in RATES}
    final = [replace(base, **rates, seed=seed, evaluations=EVALUATIONS) for seed in seeds]
    yield final
    return {"settings": settings, "tried": tried, "curves": [ledger[run]["losses"] for run in final]}


def read_rates(file: Path | None, methods: Sequence[Method]) -> dict[str, Any] | None:
    """Return a file of tuned rates, None for none; end with a message where a method is not in it."""
    if file is None:
        return None
    record: dict[str, Any] = json.loads(file.read_text())
    if missing := [method.name for method in methods if method.name not in record["methods"]]:
        sys.exit(f"{file} has no rates for {missing}; leave them out with --only")
    return record


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
    try:
        base = base_run(size, tokenized(args.text, size.vocabulary, cache))
    except (OSError, ValueError) as error:
        sys.exit(f"--text {' '.join(args.text)}: {error}")
    methods = [method for method in METHODS if re.search(args.only, method.name)]
    tuned, start = (read_rates(file, methods) for file in (args.tuned, args.start))
    if tuned is not None and tuned["size"] != args.size:
        sys.exit(f"{args.tuned} was tuned for --size {tuned['size']}; give that size, or --start to tune from there")
    ledger = Ledger(args.results)
    pool = Pool(train, ledger, cache, args.workers)
    tasks = [
        compare(
            replace(base, method=method.name),
            args.seeds,
            ledger,
            tuned=tuned and tuned["methods"][method.name],
            start=starting_rates(method, size.width, start),
            budget=args.budget,
            knobs=args.knobs,
        )
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
        machine=describe_machine(pick_device()),
        methods={method.name: result for method, result in zip(methods, found, strict=True)},
        seconds=None if args.no_timing else time_steps(methods, base, cache),
    )
    for file in write_report(comparison, args.out, console):
        console.print(f"wrote {file}")


if __name__ == "__main__":
    main()
