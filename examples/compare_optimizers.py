"""Train the same small language model with AdamW, Muon and NorMuon; print a table, draw the loss curves.

python examples/compare_optimizers.py
python examples/compare_optimizers.py --text my_corpus/ --steps 500
"""

from __future__ import annotations

import json
import statistics
from argparse import Namespace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.table import Table
from settings import OPTIMIZERS, bf16_is_fast, learning_rates, make_parser
from train_accelerate import Result, train

LABELS = {"adamw": "AdamW", "muon": "Muon", "normuon": "NorMuon"}
FOLDER = Path("demo")


def steps_to_reach(losses: dict[int, float], target: float) -> float | None:
    """Return the step at which the validation loss first passes below ``target``, between evaluations on a line."""
    before: tuple[int, float] | None = None
    for step, loss in sorted(losses.items()):
        if loss <= target:
            if before is None:
                return float(step)
            share = (before[1] - target) / (before[1] - loss)
            return before[0] + share * (step - before[0])
        before = step, loss
    return None


def make_table(results: dict[str, Result]) -> Table:
    """Return one row per optimizer."""
    target = results["adamw"].losses[max(results["adamw"].losses)]
    table = Table("optimizer", "validation loss", "steps to AdamW's final loss", "seconds per step", "optimizer state")
    for name, result in results.items():
        last = max(result.losses)
        reached = steps_to_reach(result.losses, target)
        table.add_row(
            LABELS[name],
            f"{result.losses[last]:.4f}",
            "not reached" if reached is None else f"{reached:.0f} ({reached / last - 1:+.0%})",
            f"{statistics.median(result.step_seconds):.3f}",
            f"{result.state_bytes / 2**20:.1f} MiB",
        )
    return table


def draw(results: dict[str, Result], file: Path) -> None:
    """Draw validation loss over steps."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, result in results.items():
        axes.plot(list(result.losses), list(result.losses.values()), marker=".", label=LABELS[name])
    axes.axhline(results["adamw"].losses[max(results["adamw"].losses)], color="grey", linewidth=0.8, linestyle=":")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("validation loss (nats per token)")
    axes.set_title("Same model, data and seed; rates tuned for each")
    axes.legend()
    figure.savefig(file, dpi=150)


def main() -> None:
    args = make_parser(__doc__.splitlines()[0]).parse_args()
    console = Console()
    precision = "bf16 autocast" if bf16_is_fast() else "float32 (no fast bf16 here)"
    console.print(f"{args.steps} steps each, {torch.get_num_threads()} threads, {precision}")
    results = {}
    for name in OPTIMIZERS:
        run = Namespace(**vars(args), optim=name, output=FOLDER / name, resume=False)
        lr, adamw_lr = learning_rates(run)
        console.print(f"{LABELS[name]}: learning rate {lr:g} of the hidden matrices, {adamw_lr:g} of the rest")
        results[name] = train(run)
    draw(results, FOLDER / "loss.png")
    (FOLDER / "results.json").write_text(json.dumps({name: vars(result) for name, result in results.items()}, indent=1))
    console.print(make_table(results))
    console.print(f"loss curves in {FOLDER / 'loss.png'}, numbers in {FOLDER / 'results.json'}")


if __name__ == "__main__":
    main()
