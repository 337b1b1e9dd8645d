"""Measure a step of NorMuon and of every importable peer on the hidden matrices of a model.

python benchmarks/step.py --model gpt2
python benchmarks/step.py --shapes 512x512*4,512x2048*2 --repetitions 9
PYTHONPATH=../dion:../NorMuon python benchmarks/step.py --model llama-1.1b --layers 1 --only "^ours$|Muon"
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from contenders import CONTENDERS, NS_STEPS
from exchange import measure_exchange
from machine import describe_machine
from measure import dense_multiplications
from race import race
from report import show, write
from rich.console import Console
from shapes import MODELS, Shape, entries, format_shapes, matrices, parse_shapes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the arguments of a command line; end with a message where they cannot be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", choices=list(MODELS), default="gpt2")
    which.add_argument("--shapes", help="instead of a model: rows x cols * count, experts first")
    parser.add_argument("--layers", type=int, help="of the model; what one device steps in reasonable time if absent")
    parser.add_argument("--repetitions", type=int, default=5, help="timed steps of each contender")
    parser.add_argument("--only", default="", metavar="REGEX", help="contenders to measure, by name")
    parser.add_argument("--param-dtype", choices=list(DTYPES), default="float32", help="of weights and gradients")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of torch on a CPU; torch's own choice if absent")
    parser.add_argument("--exchange-ranks", type=int, nargs="*", default=[8, 64], help="ranks of FSDP2 to plan for")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of JSON and plot")
    args = parser.parse_args(arguments)
    if args.shapes:
        try:
            args.shapes = parse_shapes(args.shapes)
        except ValueError as error:
            parser.error(str(error))
    numbers = (args.repetitions, args.layers, args.threads, *args.exchange_ranks)
    if any(number is not None and number < 1 for number in numbers):
        parser.error("--repetitions, --layers, --threads and --exchange-ranks take numbers from 1")
    if args.shapes and args.layers:
        parser.error("--layers goes with --model; write the count into --shapes, as in 512x512*4")
    if not any(re.search(args.only, contender.name) for contender in CONTENDERS):
        parser.error(f"--only {args.only!r} names none of {[contender.name for contender in CONTENDERS]}")
    return args


def choose_shapes(args: argparse.Namespace) -> tuple[Shape, ...]:
    """Return what is stepped: all of ``--shapes``, or of the model what the device steps in reasonable time."""
    if args.shapes:
        return args.shapes
    model = MODELS[args.model]
    if args.layers:
        return model.layer * args.layers
    return model.cpu if torch.device(args.device).type == "cpu" else model.layer * model.gpu_layers


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return everything that was measured, as JSON types."""
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    shapes = choose_shapes(args)
    asked = [contender for contender in CONTENDERS if re.search(args.only, contender.name)]
    whole = args.shapes or MODELS[args.model].shapes
    return {
        "model": "shapes" if args.shapes else args.model,
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(device),
        "param_dtype": args.param_dtype,
        "shapes": format_shapes(shapes),
        "parameters": entries(shapes),
        "model_parameters": entries(whole),
        "dense_multiplications": dense_multiplications(matrices(shapes), NS_STEPS),
        **race(asked, shapes, DTYPES[args.param_dtype], device, args.repetitions),
        "exchange": measure_exchange(whole, args.exchange_ranks, NS_STEPS),
    }


def main() -> None:
    """Measure, print and write."""
    args = parse_arguments()
    console = Console(width=None if sys.stdout.isatty() else 140)
    result = measure(args)
    show(result, console)
    console.print("written:", *map(str, write(result, args.out)))


if __name__ == "__main__":
    main()
