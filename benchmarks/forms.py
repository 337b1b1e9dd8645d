"""Measure how exact Newton-Schulz is by how many steps share a Gram matrix, on matrices that are hard for it.

python benchmarks/forms.py
python benchmarks/forms.py --rows 768 --cols 3072 --dtype float32 --preset polar_express
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from normuon_plugins.core.newton_schulz import Form, Polynomial, Workspace, newton_schulz
from normuon_plugins.core.orthogonalize import PRESETS

# All of them share less and less; the first is the plain iteration.
SEGMENTS = ((1, 1, 1, 1, 1), (2, 1, 2), (2, 2, 1), (3, 2), (2, 3), (5,))


def with_spectrum(spectrum: Tensor, cols: int) -> Tensor:
    """Return a float64 matrix with these singular values and random singular vectors."""
    rows = len(spectrum)
    left, right = (torch.linalg.qr(torch.randn(side, rows, dtype=torch.float64)).Q for side in (rows, cols))
    return left @ torch.diag(spectrum.double()) @ right.mT


def structured(rows: int, cols: int) -> Iterator[tuple[str, Tensor]]:
    """Yield matrices like momentum at its worst: a few directions far above the rest, copies, sparse rows."""
    noise = torch.randn(rows, cols)
    yield "noise", noise
    yield "ones", 1 + 0.3 * noise
    yield "three decades", with_spectrum(torch.logspace(0, -3, rows), cols)
    yield "six decades", with_spectrum(torch.logspace(0, -6, rows), cols)
    yield "low rank", torch.randn(rows, 4) @ torch.randn(4, cols) + 1e-2 * noise
    yield "copies", torch.randn(6, cols)[torch.randint(6, (rows,))] + 1e-2 * noise
    yield "sparse", noise * (torch.rand(rows, cols) < 0.05) + 1e-4 * noise
    yield "waves", torch.sin(0.1 * torch.arange(rows)[:, None] + 0.2 * torch.arange(cols)) + 1e-2 * noise
    yield "rows of many scales", noise * torch.logspace(0, -4, rows)[:, None]


def iterate(matrices: Tensor, polynomials: Sequence[Polynomial], form: Form) -> Tensor:
    """Return Newton-Schulz of matrices ``(batch, m, n)`` of at most unit norm, in their dtype."""
    workspace = Workspace(matrices.dtype, matrices.device)
    x = workspace.take(matrices.shape).copy_(matrices)
    out = torch.empty_like(matrices)
    newton_schulz(x, polynomials, form, workspace, out)
    return out


def main() -> None:
    """Print one row per form: its cost, and the error and the largest singular value that it leads to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--cols", type=int, default=1024)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the products")
    parser.add_argument("--preset", choices=list(PRESETS), default="muon")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    preset, dtype = PRESETS[args.preset], getattr(torch, args.dtype)
    short, long = sorted((args.rows, args.cols))
    plain = Form(SEGMENTS[0], 1)
    errors: dict[tuple[int, ...], list[float]] = {segments: [] for segments in SEGMENTS}
    largest = dict.fromkeys(SEGMENTS, 0.0)
    exact_largest = 0.0
    for seed in range(args.seeds):
        torch.manual_seed(seed)
        for _, matrix in structured(args.rows, args.cols):
            start = (matrix.double() / (preset.margin * matrix.double().norm()))[None]
            exact = iterate(start, preset.polynomials, plain)
            exact_largest = max(exact_largest, float(torch.linalg.matrix_norm(exact, 2)))
            for segments in SEGMENTS:
                found = iterate(start.to(dtype), preset.polynomials, Form(segments, 1)).double()
                errors[segments].append(float((found - exact).norm() / exact.norm()))
                largest[segments] = max(largest[segments], float(torch.linalg.matrix_norm(found, 2)))
    table = Table("steps by Gram matrix", "multiplications", "mean error", "largest error", "largest singular value")
    for segments in SEGMENTS:
        cost = Form(segments, 1).multiplications(short, long) / plain.multiplications(short, long)
        mean, worst = statistics.mean(errors[segments]), max(errors[segments])
        name = "+".join(map(str, segments))
        table.add_row(name, f"{cost:.2f}", f"{mean:.2g}", f"{worst:.2g}", f"{largest[segments]:.4g}")
    console = Console()
    console.print(f"{args.preset}, {args.dtype} products, {args.rows} x {args.cols}, {args.seeds} seeds of 9 matrices;")
    console.print(f"errors relative to float64, whose largest singular value is {exact_largest:.4g}", table)


if __name__ == "__main__":
    main()
