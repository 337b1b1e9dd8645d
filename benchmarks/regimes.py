"""What AdamW's updates are like in pretraining and in fine-tuning: their RMS, and how many directions they have.

python benchmarks/regimes.py

A decoder is trained from scratch and MiniLM is fine-tuned, both by AdamW near its best learning rate. At a few steps,
every hidden matrix gives the RMS of its update over the learning rate, the effective rank of its momentum, and the
factor by which the rule of "match_progress_adamw" is larger than the constant 0.2 of "match_rms_adamw".
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from convergence import base_run
from evidence.adaptation import Adaptation, find_task, train
from evidence.encoding import encoded
from evidence.methods import find_method
from evidence.methods import make_optimizer as make_pretraining_optimizer
from evidence.one_rate import ADAMW, make_optimizer
from evidence.pretrained_models import MODELS, MissingModel, make_model
from evidence.sizes import SIZES
from evidence.texts import tokenized
from evidence.training import decoder, fit, load_tokens, pick_device, training_examples, validation_examples
from evidence.update_shape import watch_updates
from machine import describe_machine
from rich.console import Console
from settings import RATES, bf16_is_fast
from torch import nn

from normuon_plugins import plan_parameters

# Of a run: where updates are described.
SHARES = (0.0, 0.02, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0)
PRETRAINING, FINE_TUNING = "pretraining", "fine-tuning"
COLORS = {PRETRAINING: "#2a6f97", FINE_TUNING: "#c1121f"}
QUANTITIES = {
    "rms": "RMS of AdamW's update, over lr",
    "effective_rank": "effective rank of the momentum, % of the smaller side",
    "factor": "match_progress_adamw, over match_rms_adamw",
}
FOLDER = Path(__file__).parent / "results"


def hidden_matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what NorMuon would train of a model, by name."""
    return {row.name: row.parameter for row in plan_parameters(model) if row.algorithm == "normuon"}


def precision() -> str:
    """Return what both are trained in."""
    return "bfloat16" if bf16_is_fast() else "float32"


def sampled(steps: int) -> list[int]:
    """Return the steps to look at, the first and the last among them."""
    return sorted({max(1, round(share * steps)) for share in SHARES})


def look_at_pretraining(size_name: str, cache: Path) -> list[dict[str, Any]]:
    """Train the decoder of ``size_name`` on Python's source by AdamW; return what its updates were like."""
    size, (lr, adamw_lr) = SIZES[size_name], RATES["adamw"]
    run = base_run(size, tokenized(["python"], size.vocabulary, cache))
    tokens, model = load_tokens(cache / run.text), decoder(size, seed=1).to(pick_device())
    optimizer = make_pretraining_optimizer(model, find_method(ADAMW), lr=lr, adamw_lr=adamw_lr, weight_decay=0.0)
    records = watch_updates(optimizer, hidden_matrices(model), sampled(size.steps))
    batches, held_out = training_examples(tokens, size, seed=1), validation_examples(tokens, size)
    fit(model, optimizer, batches, held_out, evaluations=1, precision=run.precision)
    return records


def look_at_fine_tuning(model_name: str, task_name: str, steps: int, cache: Path) -> list[dict[str, Any]]:
    """Fine-tune a pretrained model by AdamW; return what its updates were like."""
    task = find_task(task_name)
    data = encoded(model_name, task, cache)
    run = Adaptation(data.name, model_name, task.name, False, ADAMW, task.lr, steps, seed=1, precision=precision())
    model = make_model(model_name, task, run.seed).to(pick_device())
    optimizer = make_optimizer(model, ADAMW, run.lr)
    records = watch_updates(optimizer, hidden_matrices(model), sampled(steps))
    train(model, optimizer, run, load_tokens(data))
    return records


def spread(records: Sequence[dict[str, Any]], key: str) -> dict[int, tuple[float, float, float]]:
    """Return, by step, the lower decile, the median and the upper decile over matrices."""
    found = {}
    for step in sorted({record["step"] for record in records}):
        values = torch.tensor([record[key] for record in records if record["step"] == step], dtype=torch.float64)
        low, middle, high = values.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
        found[step] = (low, middle, high)
    return found


def markdown(regimes: dict[str, Sequence[dict[str, Any]]]) -> str:
    """Return a row for each regime and part of the run."""
    lines = [
        "Medians over hidden matrices, in brackets the middle 80 %.",
        "",
        f"| regime | steps | {' | '.join(QUANTITIES.values())} |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, records in regimes.items():
        steps = sorted({record["step"] for record in records})
        for words, chosen in (
            ("the first", steps[:1]),
            (f"{steps[len(steps) // 2]} to {steps[-1]}", steps[len(steps) // 2 :]),
        ):
            cells = []
            for key in QUANTITIES:
                found = spread(records, key)
                bounds = [100 * value if key == "effective_rank" else value for value in _mean_of(found, chosen)]
                cells.append(f"{bounds[1]:.2g} [{bounds[0]:.2g}, {bounds[2]:.2g}]")
            lines.append(f"| {name} | {words} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _mean_of(found: dict[int, tuple[float, float, float]], steps: Sequence[int]) -> list[float]:
    return [statistics.fmean(values) for values in zip(*(found[step] for step in steps), strict=True)]


def draw(regimes: dict[str, Sequence[dict[str, Any]]], file: Path) -> None:
    """Draw RMS and effective rank over the run: median, and the band of the middle 80 % of the matrices."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for axes, key in zip(panels, ("rms", "effective_rank"), strict=True):
        scale = 100 if key == "effective_rank" else 1
        for name, records in regimes.items():
            found = spread(records, key)
            steps = list(found)
            low, middle, high = ([scale * value for value in values] for values in zip(*found.values(), strict=True))
            axes.plot(steps, middle, ".-", color=COLORS[name])
            axes.fill_between(steps, low, high, color=COLORS[name], alpha=0.15, linewidth=0)
            axes.annotate(name, (steps[-1], middle[-1]), (6, 0), textcoords="offset points", color=COLORS[name])
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(*_plain_ticks(axes.get_xlim()))
        axes.set_yticks(*_plain_ticks(axes.get_ylim()))
        axes.minorticks_off()
        axes.set_xlabel("optimizer step")
        axes.set_title(QUANTITIES[key], fontsize=10)
        axes.margins(x=0.12)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].axhline(0.2, color="0.5", linestyle=(0, (1, 2)))
    panels[0].annotate("0.2, the paper's constant", (1, 0.2), (0, -10), textcoords="offset points", color="0.4")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _plain_ticks(limits: tuple[float, float]) -> tuple[list[float], list[str]]:
    """Return 1, 2 and 5 times the powers of ten between the limits, and how they are written."""
    ticks = [digit * 10.0**power for power in range(-3, 5) for digit in (1, 2, 5)]
    inside = [tick for tick in ticks if limits[0] <= tick <= limits[1]]
    return inside, [f"{tick:g}" for tick in inside]


def parse_arguments() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="2m", help="of the decoder")
    parser.add_argument("--model", default=MODELS[0].name, help="that is fine-tuned, as in pretrained.py")
    parser.add_argument("--task", default="library", help="of fine-tuning, as in pretrained.py")
    parser.add_argument("--steps", type=int, default=120, help="of fine-tuning")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the report")
    return parser.parse_args()


def main() -> None:
    """Write the report that the command line asks for."""
    args = parse_arguments()
    torch.set_num_threads(1)
    try:
        fine_tuning = look_at_fine_tuning(args.model, args.task, args.steps, args.out / "cache")
    except MissingModel as error:
        sys.exit(str(error))
    regimes = {PRETRAINING: look_at_pretraining(args.size, args.out / "cache"), FINE_TUNING: fine_tuning}
    table = markdown(regimes)
    Console().print(table, markup=False, soft_wrap=True)
    (args.out / "regimes.md").write_text(table)
    record = {
        "command": shlex.join(["python", *sys.argv]),
        "machine": describe_machine(pick_device()),
        "arguments": {key: str(value) for key, value in vars(args).items()},
        "regimes": regimes,
    }
    (args.out / "regimes.json").write_text(json.dumps(record, indent=1))
    draw(regimes, args.out / "regimes.png")


if __name__ == "__main__":
    main()
