"""How the best learning rate of the hidden matrices moves with the width of the model, under both conventions.

python benchmarks/transfer.py
python benchmarks/transfer.py --widths 128 256 512 1024 --seeds 1 2 3

A model of two layers at every width, everything else equal. The rates lie on powers of two and are followed until the
best one lies inside; a parabola through it and its neighbours says where between them the optimum is.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from convergence import base_run, default_workers
from evidence.ledger import Ledger
from evidence.methods import Method, find_method
from evidence.pool import Pool, Task
from evidence.sizes import Size
from evidence.texts import tokenized
from evidence.training import Run, train
from rich.console import Console

CONVENTIONS = ("NorMuon", "NorMuon, original scaling")
# Where the search begins, in units of the method (Method.unit), and what does not move.
START, ADAMW_LR, WEIGHT_DECAY = 1.6e-2, 1.6e-2, 0.1
SIZE = Size(width=0, layers=2, vocabulary=1024, sequence_length=128, batch_size=4, steps=100)
FOLDER = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Valley:
    """The losses of one method at one width.

    Attributes:
        method: Its name.
        width: Of the model.
        losses: Learning rate -> final loss of every seed.
    """

    method: str
    width: int
    losses: dict[float, list[float]]

    def means(self) -> dict[float, float]:
        """Return the mean loss at every rate, in ascending order."""
        return {rate: statistics.fmean(self.losses[rate]) for rate in sorted(self.losses)}

    def best(self, seed: int | None = None) -> float:
        """Return the rate at the bottom of the parabola through the best point and its neighbours, in log2 of the rate.

        Args:
            seed: Place in the list of seeds; None takes the mean loss.
        """
        losses = self.means() if seed is None else {rate: found[seed] for rate, found in sorted(self.losses.items())}
        rates = list(losses)
        place = min(range(len(rates)), key=lambda index: losses[rates[index]])
        if not 0 < place < len(rates) - 1:
            return rates[place]  # of one seed: the grid was extended for the mean
        left, middle, right = (losses[rates[place + offset]] for offset in (-1, 0, 1))
        if not all(map(math.isfinite, (left, middle, right))):
            return rates[place]
        return rates[place] * 2 ** (0.5 * (left - right) / (left - 2 * middle + right))


def follow(method: Method, base: Run, seeds: Sequence[int], ledger: Ledger) -> Task[Valley]:
    """Try rates until the best mean has a worse one on each side; see ``Pool``."""
    tried: dict[int, list[float]] = {}
    wanted = [-1, 0, 1]
    while wanted:
        runs = {
            place: [
                replace(base, method=method.name, lr=rate_at(place, method, base.width), seed=seed) for seed in seeds
            ]
            for place in wanted
        }
        yield [run for several in runs.values() for run in several]
        for place, several in runs.items():
            tried[place] = [ledger[run]["losses"][str(base.steps)] for run in several]
        best = min(tried, key=lambda place: statistics.fmean(tried[place]))
        wanted = [place for place in (best - 1, best + 1) if place not in tried]
    losses = {rate_at(place, method, base.width): tried[place] for place in sorted(tried)}
    return Valley(method.name, base.width, losses)


def rate_at(place: int, method: Method, width: int) -> float:
    """Return the learning rate at a place of the grid."""
    return float(f"{START * 2.0**place * method.unit(width):.3g}")


def slope(valleys: Sequence[Valley], seed: int | None = None) -> float:
    """Return the exponent of the width in a line through the best rates, both logarithmic."""
    fit = statistics.linear_regression(
        [math.log2(valley.width) for valley in valleys], [math.log2(valley.best(seed)) for valley in valleys]
    )
    return fit.slope


def markdown(valleys: dict[str, list[Valley]], seeds: Sequence[int]) -> str:
    """Return a row per width: the best rate of both conventions, with its range over the seeds, and the loss there."""
    names = list(valleys)
    lines = [
        f"Best learning rate ({len(seeds)} seeds; brackets: the smallest and largest of single seeds).",
        "",
        "| width | " + " | ".join(f"{name}: best lr | loss" for name in names) + " |",
        "| --- |" + " --- |" * (2 * len(names)),
    ]
    for row in zip(*valleys.values(), strict=True):
        cells = []
        for valley in row:
            single = [valley.best(place) for place in range(len(seeds))]
            cells += [
                f"{valley.best():.3g} [{min(single):.3g}, {max(single):.3g}]",
                f"{min(valley.means().values()):.3f}",
            ]
        lines.append(f"| {row[0].width} | " + " | ".join(cells) + " |")
    slopes = []
    for name in names:
        single = [slope(valleys[name], place) for place in range(len(seeds))]
        slopes += [f"{slope(valleys[name]):+.2f} [{min(single):+.2f}, {max(single):+.2f}]", ""]
    lines.append("| exponent of the width | " + " | ".join(slopes) + " |")
    return "\n".join(lines) + "\n"


def draw(valleys: dict[str, list[Valley]], seeds: Sequence[int], file: Path) -> None:
    """Draw loss over rate for every width, and the best rate over width."""
    figure, axes = plt.subplots(1, len(valleys) + 1, figsize=(4.6 * (len(valleys) + 1), 4.2), layout="constrained")
    for axis, (name, found) in zip(axes, valleys.items(), strict=False):
        for valley in found:
            means = valley.means()
            (line,) = axis.plot(list(means), list(means.values()), marker=".", label=f"width {valley.width}")
            axis.axvline(valley.best(), color=line.get_color(), linestyle=":", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.set_xlabel("lr of the hidden matrices")
        axis.set_ylabel("final validation loss")
        axis.set_title(name, fontsize="medium")
        axis.legend(fontsize="small")
    for name, found in valleys.items():
        widths = [valley.width for valley in found]
        (line,) = axes[-1].plot(
            widths, [valley.best() for valley in found], marker="o", label=f"{name}: width^{slope(found):+.2f}"
        )
        for place in range(len(seeds)):
            axes[-1].plot(widths, [valley.best(place) for valley in found], ".", color=line.get_color(), alpha=0.5)
    axes[-1].set_xscale("log", base=2)
    axes[-1].set_yscale("log", base=2)
    axes[-1].set_xlabel("width")
    axes[-1].set_ylabel("best lr")
    axes[-1].set_title("where the optimum lies", fontsize="medium")
    axes[-1].legend(fontsize="small")
    figure.savefig(file, dpi=120)


def parse_arguments() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256, 512], help="multiples of 64")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=SIZE.steps, help="optimizer steps of a run")
    parser.add_argument("--vocabulary", type=int, default=SIZE.vocabulary, help="size of the tokenizer")
    parser.add_argument("--text", nargs="+", default=["python"], help="as in convergence.py")
    parser.add_argument("--workers", type=int, default=default_workers(), help="runs at once, one thread each")
    parser.add_argument("--results", type=Path, default=FOLDER / "transfer.jsonl")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of table and plot")
    args = parser.parse_args()
    if len(args.widths) < 2 or any(width % 64 or width < 64 for width in args.widths):
        parser.error("--widths takes at least two multiples of 64, the size of an attention head")
    return args


def main() -> None:
    """Run the benchmark that the command line asks for."""
    args = parse_arguments()
    cache = args.results.parent / "cache"
    text = tokenized(args.text, args.vocabulary, cache)
    ledger = Ledger(args.results)
    pool = Pool(train, ledger, cache, args.workers)
    wanted = [(name, width) for name in CONVENTIONS for width in sorted(args.widths, reverse=True)]
    tasks = []
    for name, width in wanted:
        base = base_run(replace(SIZE, width=width, steps=args.steps, vocabulary=args.vocabulary), text)
        base = replace(base, adamw_lr=ADAMW_LR, weight_decay=WEIGHT_DECAY)
        tasks.append(follow(find_method(name), base, args.seeds, ledger))
    found = pool.carry_out(tasks, "transfer", len(tasks) * 5 * len(args.seeds))
    pool.close()
    valleys = {
        name: sorted((valley for valley in found if valley.method == name), key=lambda valley: valley.width)
        for name in CONVENTIONS
    }
    args.out.mkdir(parents=True, exist_ok=True)
    table = markdown(valleys, args.seeds)
    Console().print(table, markup=False, soft_wrap=True)
    (args.out / "transfer.md").write_text(table)
    record: dict[str, Any] = {name: [asdict(valley) for valley in several] for name, several in valleys.items()}
    (args.out / "transfer.json").write_text(json.dumps({"seeds": args.seeds, "valleys": record}, indent=1))
    draw(valleys, args.seeds, args.out / "transfer.png")


if __name__ == "__main__":
    main()
