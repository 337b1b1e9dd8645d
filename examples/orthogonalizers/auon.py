"""AuON's scaling in linear time in place of Newton-Schulz: NorMuon(..., orthogonalize_fn=cosh_rms_scaling).

Maity, "AuON: A Linear-time Alternative to Orthogonal Momentum Updates", https://arxiv.org/abs/2509.24320. Combine it
with normalize_neurons=False and adjust_lr_fn="original" for the paper's optimizer, whose rate is about 0.2.

One number divides the whole matrix: directions and condition numbers are those of the momentum. Entries of a matrix of
norm 1 are small and cosh of them is near 1, so this is momentum divided by its norm.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cosh_rms_scaling(matrices: Tensor) -> Tensor:
    """Return each matrix divided by its Frobenius norm, then by the root mean square of cosh of its entries.

    Args:
        matrices: Shape ``(batch, rows, cols)``. Not modified. A matrix of zeros stays zero.
    """
    wide = matrices.float()
    norm = torch.linalg.vector_norm(wide, dim=(-2, -1), keepdim=True)
    unit = wide / norm.clamp_min(torch.finfo(wide.dtype).tiny)
    return (unit / unit.cosh().square().mean(dim=(-2, -1), keepdim=True).sqrt()).to(matrices.dtype)
