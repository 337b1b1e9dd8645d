"""What was measured: tables for a terminal, JSON with every single time, a plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rich.console import Console
from rich.markup import escape
from rich.table import Table

Record = dict[str, Any]


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def speed_table(result: Record) -> Table:
    """Return one row of times per contender."""
    table = Table(
        "contender", "median s", "quartiles s", "of fastest peer", "TFLOP/s dense", "TFLOP/s needed", "of matmul"
    )
    for row in result["contenders"]:
        table.add_row(
            row["name"],
            f"{row['median']:.4g}",
            f"{row['lower_quartile']:.4g} to {row['upper_quartile']:.4g}",
            _ratio(row["ratio_to_fastest_peer"]),
            *(_ratio(None if row[key] is None else row[key] / 1e12) for key in ("dense_flops", "needed_flops")),
            _ratio(row["fraction_of_matmul"]),
        )
    matmul = result["matmul"]
    label = f"torch.mm, {matmul['dtype']}, dense"
    table.add_row(label, f"{matmul['median']:.4g}", "", "", f"{matmul['flops'] / 1e12:.3f}", "", "1")
    return table


def memory_table(result: Record) -> Table:
    """Return one row of bytes and of accuracy per contender."""
    table = Table(
        "contender", "state MiB", "per parameter byte", "of AdamW float32", "transient MiB", "singular values"
    )
    for row in result["contenders"]:
        table.add_row(
            row["name"],
            f"{row['state_bytes'] / 2**20:.2f}",
            _ratio(row["state_per_parameter_byte"]),
            _ratio(row["state_ratio_to_adamw"]),
            f"{row['transient_bytes'] / 2**20:.1f}",
            "\n".join(
                f"{rows}x{cols}: {found['smallest']:.3f} to {found['largest']:.3f}, cosine {found['cosine']:.4f}"
                for found in row["accuracy"]
                for rows, cols in [found["shape"]]
            ),
        )
    return table


def exchange_table(result: Record) -> Table:
    """Return one row for each number of ranks."""
    table = Table("FSDP2 ranks", "MiB received", "all-gather", "10^12 multiplications, busiest", "all-gather")
    for row in result["exchange"]:
        table.add_row(
            str(row["ranks"]),
            f"{row['bytes_received'] / 2**20:.0f}",
            f"{row['all_gather_bytes_received'] / 2**20:.0f}",
            f"{row['multiplications'] / 1e12:.3f}",
            f"{row['all_gather_multiplications'] / 1e12:.3f}",
        )
    return table


def show(result: Record, console: Console) -> None:
    """Print everything but the single times."""
    machine = result["machine"]
    console.print(f"[bold]{result['model']}[/bold]: {result['shapes']}, {result['parameters']:,} parameters")
    console.print(
        f"{machine['name']}, {machine['threads']} threads of {machine['cores']} cores, torch {machine['torch']}"
    )
    console.print(speed_table(result), memory_table(result), exchange_table(result), sep="\n")
    for row in result["contenders"]:
        if row["note"]:
            console.print(f"{row['name']}: {row['note']}")
    for name, error in result["failed"].items():
        console.print(f"[red]failed[/red] {name}: {escape(error)}")
    for name, module in result["absent"].items():
        console.print(f"absent {name}: no module {module}")


def draw(result: Record, file: Path) -> None:
    """Draw the median step times by that of our first variant, with quartiles."""
    rows = sorted(result["contenders"], key=lambda row: row["median"], reverse=True)
    ours = next((row for row in result["contenders"] if row["ours"]), rows[-1])
    unit = ours["median"]
    spans = [
        [(row["median"] - row["lower_quartile"]) / unit for row in rows],
        [(row["upper_quartile"] - row["median"]) / unit for row in rows],
    ]
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.35 * len(rows)), layout="constrained")
    colors = ["tab:blue" if row["ours"] else "tab:grey" for row in rows]
    axes.barh([row["name"] for row in rows], [row["median"] / unit for row in rows], xerr=spans, color=colors)
    axes.axvline(result["matmul"]["median"] / unit, color="black", linestyle=":", label="dense products as torch.mm")
    axes.set_xlabel(f"step time by that of {ours['name']} ({unit:.3g} s)")
    axes.set_title(f"{result['model']}, {result['machine']['name']}", fontsize="medium")
    axes.legend()
    figure.savefig(file, dpi=150)
    plt.close(figure)


def write(result: Record, folder: Path) -> list[Path]:
    """Write ``<model>.json`` and ``<model>.png``; return both."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{result['model']}{suffix}" for suffix in (".json", ".png")]
    files[0].write_text(json.dumps(result, indent=1))
    draw(result, files[1])
    return files
