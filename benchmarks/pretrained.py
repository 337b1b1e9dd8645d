"""Fine-tune pretrained models that PyPI packages ship, at AdamW's own learning rate and at each method's best.

python benchmarks/pretrained.py                                     # MiniLM, one task, three methods, ten minutes
python benchmarks/pretrained.py --tasks all --steps 150 --seeds 1 2 3 4 5 --name pretrained-150
python benchmarks/pretrained.py --tasks library --lora --name pretrained-lora
python benchmarks/pretrained.py --models my_encoder/ --tasks docstrings pairs

One learning rate serves everything that is trained, as it does in the Trainer. AdamW's is followed to its best on
powers of two; every method is run there, at half and at twice of it, and followed to its own best. Heads, order of the
examples and dropout are the same for all methods of a seed. Every finished run is a line of the results file: an
interrupted benchmark goes on where it stopped.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from convergence import default_workers
from evidence.adaptation import Adaptation, adapt
from evidence.encoding import encoded
from evidence.one_rate import ADAMW, LORA_METHODS, METHODS
from evidence.pretrained_models import MODELS, MissingModel, fits
from evidence.rate_program import add_run_arguments, carry_out, check_run_arguments, chosen, report
from evidence.rate_report import Comparison
from evidence.tasks import TASKS, Task
from rich.console import Console
from settings import bf16_is_fast

QUICK_TASKS = ("library",)
FOLDER = Path(__file__).parent / "results"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the arguments of a command line; end with a message where they cannot be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [model.name for model in MODELS]
    parser.add_argument("--models", nargs="+", default=known, help=f"of {', '.join(known)}, or folders")
    tasks = [task.name for task in TASKS]
    parser.add_argument("--tasks", nargs="+", default=QUICK_TASKS, choices=[*tasks, "all"])
    parser.add_argument("--lora", action="store_true", help="train LoRA under every policy, not all weights")
    add_run_arguments(parser, name="pretrained", steps=100, workers=default_workers(), folder=FOLDER)
    args = parser.parse_args(arguments)
    check_run_arguments(parser, args)
    if not any(re.search(args.only, method) for method in methods_of(args.lora)):
        parser.error(f"--only {args.only!r} names none of {list(methods_of(args.lora))}")
    args.tasks = [task for task in TASKS if task.name in args.tasks or "all" in args.tasks]
    return args


def methods_of(lora: bool) -> list[str]:
    """Return the names of the methods of an arm."""
    return list(LORA_METHODS if lora else METHODS)


def find_runs(args: argparse.Namespace, cache: Path, console: Console) -> list[tuple[Task, Adaptation]]:
    """Return the run that each comparison begins with; say what is left out, and what to install for it."""
    found = []
    for model in args.models:
        for task in args.tasks:
            if not fits(model, task):
                continue
            if args.lora and task.kind == "pitch":
                console.print(f"skipped {model}, {task.name}: LoRA is for the encoders of text")
                continue
            try:
                data = encoded(model, task, cache)
            except (MissingModel, OSError, ValueError) as error:
                console.print(f"skipped {model}, {task.name}: {error}", markup=False)
                continue
            lr = task.lora_lr if args.lora else task.lr
            precision = "bfloat16" if bf16_is_fast() else "float32"
            run = Adaptation(data.name, model, task.name, args.lora, ADAMW, lr, args.steps, 0, precision)
            found.append((task, run))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark that a command line asks for."""
    args = parse_arguments(arguments)
    console = Console()
    cache = args.results.parent / "cache"
    bases = find_runs(args, cache, console)
    if not bases:
        sys.exit("nothing is left to run")
    methods = chosen(methods_of(args.lora), args)
    results = carry_out(args, adapt, [base for _, base in bases], methods, "fine-tuning")
    comparisons = [
        Comparison(
            base.model,
            task.name,
            task.title,
            args.lora,
            args.steps,
            args.seeds,
            found,
        )
        for (task, base), found in zip(bases, results, strict=True)
    ]
    report(comparisons, args, console)


if __name__ == "__main__":
    main()
