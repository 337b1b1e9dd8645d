"""REG's row and column scaling in place of Newton-Schulz: NorMuon(..., orthogonalize_fn=row_and_column_scaling).

Liu et al., "REG: A Regularization Optimizer for Robust Training Dynamics", https://arxiv.org/abs/2510.03691: balance a
matrix instead of orthogonalizing it. Combine it with normalize_neurons=False for the paper's optimizer; the default
adjust_lr_fn is its RMS scaling.
"""

from __future__ import annotations

import torch
from torch import Tensor


def row_and_column_scaling(matrices: Tensor) -> Tensor:
    """Return matrices whose rows, then columns, were divided by their Euclidean norms (the paper's p = 2).

    Args:
        matrices: Shape ``(batch, rows, cols)``. Not modified. Zero rows and columns stay zero.
    """
    scaled = matrices.float()
    for dim in (-1, -2):
        norms = torch.linalg.vector_norm(scaled, dim=dim, keepdim=True)
        scaled = scaled / norms.clamp_min(torch.finfo(scaled.dtype).tiny)
    return scaled.to(matrices.dtype)
