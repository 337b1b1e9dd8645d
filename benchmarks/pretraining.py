"""Pretrain a small decoder at AdamW's own learning rate, at half and at twice of it, and at each method's best.

python benchmarks/pretraining.py                                       # one rate for everything, 120 steps, two texts
python benchmarks/pretraining.py --adamw-lr 0.032                      # that of the rest is tuned already
python benchmarks/pretraining.py --texts python --steps 480 --seeds 1 2

What ``pretrained.py`` does for fine-tuning: AdamW's rate is followed to its best on powers of two; every method is run
there and beside it, and followed to its own best. Weights and order of the examples are the same for all methods of a
seed. Every finished run is a line of the results file: an interrupted benchmark goes on where it stopped.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from convergence import default_workers
from evidence.methods import make_optimizer
from evidence.one_rate import ADAMW, PRETRAINING_METHODS
from evidence.rate_program import add_run_arguments, carry_out, check_run_arguments, chosen, report
from evidence.rate_report import Comparison
from evidence.sizes import SIZES
from evidence.texts import NAMED, tokenized
from evidence.training import decoder, fit, load_tokens, pick_device, training_examples, validation_examples
from rich.console import Console
from settings import bf16_is_fast

# Where the search for AdamW's rate begins.
START = 8e-3
WEIGHT_DECAY = 0.1
FOLDER = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Pretraining:
    """Everything that decides a run's result; the ledger's key.

    Attributes:
        data: Name of the file of tokens, which is that of their content.
        size: Name of the model.
        steps: Optimizer steps.
        method: One of ``PRETRAINING_METHODS``.
        lr: Peak learning rate of the hidden matrices.
        adamw_lr: Of everything else; None is ``lr``.
        seed: Of the weights and of the order of the examples.
        precision: ``"float32"`` or ``"bfloat16"`` (autocast).
    """

    data: str
    size: str
    steps: int
    method: str
    lr: float
    adamw_lr: float | None
    seed: int
    precision: str


def pretrain(run: Pretraining, cache: Path) -> dict[str, Any]:
    """Carry out ``run``; the tokens lie in ``cache``. Return the held-out ``loss`` and the ``seconds``."""
    size = replace(SIZES[run.size], steps=run.steps)
    tokens = load_tokens(cache / run.data)
    model = decoder(size, run.seed).to(pick_device())
    rates = {"lr": run.lr, "adamw_lr": run.lr if run.adamw_lr is None else run.adamw_lr}
    optimizer = make_optimizer(model, PRETRAINING_METHODS[run.method], **rates, weight_decay=WEIGHT_DECAY)
    batches, held_out = training_examples(tokens, size, run.seed), validation_examples(tokens, size)
    result = fit(model, optimizer, batches, held_out, evaluations=1, precision=run.precision)
    return {"loss": result["losses"][str(run.steps)], "seconds": result["seconds"]}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the arguments of a command line; end with a message where they cannot be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="2m", help="of the model")
    parser.add_argument("--texts", nargs="+", default=["python", "documentation"], choices=list(NAMED))
    parser.add_argument("--adamw-lr", type=float, help="of embeddings, head and norms; that of the matrices if absent")
    add_run_arguments(parser, name="pretraining", steps=120, workers=default_workers(), folder=FOLDER)
    args = parser.parse_args(arguments)
    check_run_arguments(parser, args)
    return args


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark that a command line asks for."""
    args = parse_arguments(arguments)
    console = Console()
    cache = args.results.parent / "cache"
    precision = "bfloat16" if bf16_is_fast() else "float32"
    methods = chosen(PRETRAINING_METHODS, args)
    bases = []
    for text in args.texts:
        data = tokenized([text], SIZES[args.size].vocabulary, cache).name
        bases.append(Pretraining(data, args.size, args.steps, ADAMW, START, args.adamw_lr, 0, precision))
    results = carry_out(args, pretrain, bases, methods, "pretraining")
    rest = "one rate for everything" if args.adamw_lr is None else f"{args.adamw_lr:g} for the rest"
    comparisons = [
        Comparison(
            f"Llama {args.size}",
            text,
            rest,
            False,
            args.steps,
            args.seeds,
            found,
        )
        for text, found in zip(args.texts, results, strict=True)
    ]
    report(comparisons, args, console, size=asdict(SIZES[args.size]))


if __name__ == "__main__":
    main()
