"""How orthogonal an update is, so that fast and inexact does not pass for fast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from contenders import Contender
from torch import Tensor, nn

# The singular values of the gradient fall from one by this factor. Five steps of the Muon polynomial lift what is
# 485 times below the norm (3.4445 ** 5), so an exact implementation brings all of them near one.
CONDITION = 100.0
# A float64 SVD of more takes minutes on a CPU, for each contender.
LARGEST_SIDE = 1024


@dataclass(frozen=True)
class Accuracy:
    """One update beside the orthogonal factor of its gradient.

    Attributes:
        shape: Of the matrix.
        smallest: Singular value of the update, where their root mean square is one.
        largest: Likewise.
        cosine: Between update and orthogonal factor; one for an exact Muon. The neuron step changes it.
    """

    shape: tuple[int, int]
    smallest: float
    largest: float
    cosine: float


def choose(sizes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the smallest square and the smallest other size, of those whose SVD does not take long."""
    by_work = sorted({*sizes}, key=lambda size: (min(size) ** 2 * max(size), size))
    small = [size for size in by_work if min(size) <= LARGEST_SIDE]
    chosen = [size for size in small if size[0] == size[1]][:1] + [size for size in small if size[0] != size[1]][:1]
    return chosen or by_work[:1]


class Oracle:
    """A gradient of known singular vectors, and what its update should be.

    Args:
        size: ``(rows, cols)``.
        seed: Of the random singular vectors.
    """

    def __init__(self, size: tuple[int, int], seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        rank = min(size)
        left, right = (
            torch.linalg.qr(torch.randn(side, rank, dtype=torch.float64, generator=generator)).Q for side in size
        )
        values = torch.logspace(0, -1, rank, base=CONDITION, dtype=torch.float64)
        self.size = size
        self.gradient = (left * values) @ right.mT
        self.factor = left @ right.mT

    def judge(self, update: Tensor) -> Accuracy:
        """Return the accuracy of an update, at any scale."""
        update = update.double().cpu()
        values = torch.linalg.svdvals(update)
        values = values / values.square().mean().sqrt()
        cosine = (update * self.factor).sum() / (update.norm() * self.factor.norm())
        return Accuracy(self.size, float(values[-1]), float(values[0]), float(cosine))


def measure_accuracy(
    contender: Contender, oracles: Sequence[Oracle], dtype: torch.dtype, device: torch.device
) -> list[dict[str, Any]]:
    """Return the accuracy of a contender's first update of zero weights, one record per oracle.

    One that does not orthogonalize has none.
    """
    found: list[dict[str, Any]] = []
    if not contender.orthogonalizes:
        return found
    for oracle in oracles:
        parameter = nn.Parameter(torch.zeros(oracle.size, dtype=contender.dtype or dtype, device=device))
        parameter.grad = oracle.gradient.to(parameter)
        contender.build([parameter], 1.0, 0.0).step()
        found.append(asdict(oracle.judge(-parameter.detach())))
    return found
