"""How large the gradient of every matrix is, summed up where the gradient lies: one number per matrix and rank.

``match_progress_adamw`` asks for the mean square of a whole matrix' gradient. The gradient itself never travels: every
rank adds up the squares of what it holds, these few numbers go along with the matrices to their owner, and the owner
adds them up.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from normuon_plugins.distributed.boxes import Box, Piece, length, shared
from normuon_plugins.distributed.placement import Blocks


def partial_sums(blocks: Blocks, box: Box, count: int) -> tuple[Blocks, Box]:
    """Return where the sums of the ranks lie before they are added up, and the box that holds them all.

    Seen as a tensor of shape ``(k, count)``: each of the ``k`` ranks of a replica that hold any of the matrices has
    one row, all others have none of it.

    Args:
        blocks: Where the parameter lies.
        box: The matrices within it.
        count: How many they are.
    """
    rows: dict[int, int] = {}  # of each replica so far
    boxes: list[Box] = []
    columns = ((0, count),)
    for replica, held in zip(blocks.replicas, blocks.boxes, strict=True):
        row = rows.get(replica, 0)
        if shared(held, box):
            boxes.append((((row, row + 1),), columns))
            rows[replica] = row + 1
        else:
            boxes.append(((), columns))
    return Blocks(blocks.ranks, tuple(boxes), blocks.replicas), (((0, max(rows.values())),), columns)


def sum_squares(gradient: Tensor, pieces: Iterable[Piece], box: Box, expert_dim: int | None) -> Tensor:
    """Return the sum of squares of what this rank holds of some matrices' gradients.

    Args:
        gradient: This rank's block. Not modified.
        pieces: What the block shares with the box, see ``boxes.pieces``.
        box: The matrices within the parameter.
        expert_dim: The dimension that counts them; None where the box is one matrix.

    Returns:
        Shape ``(1, count)``, float32: zero for matrices of which this rank holds nothing.
    """
    sizes = tuple(map(length, box))
    count = 1 if expert_dim is None else sizes[expert_dim]
    sums = torch.zeros(1, count, dtype=torch.float32, device=gradient.device)
    # Like the box, but every entry of a matrix is the same number in memory: a piece of it tells which are added up.
    target = sums.as_strided(sizes, [int(dim == expert_dim) for dim in range(len(sizes))])
    for piece in pieces:
        here, there = piece.view(gradient, 0), piece.view(target, 1)
        matrix_dims = [dim for dim in range(there.ndim) if there.stride(dim) == 0]
        there[tuple(0 if dim in matrix_dims else slice(None) for dim in range(there.ndim))] += _norms(here, matrix_dims)
    return sums


def _norms(tensor: Tensor, dims: Sequence[int]) -> Tensor:
    """Return the sums of squares over ``dims``, in float32 or wider.

    Not one norm over all of them: on a CPU that adds 58 million squares one after the other in float32 and is 0.9 %
    short. In two passes it is right to 4e-8 and as fast (4096 x 14336; in float64 it takes ten times as long).
    """
    farthest = max(dims, key=tensor.stride)
    near = [dim for dim in dims if dim != farthest] or [farthest]
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(tensor, dim=near, keepdim=True, dtype=dtype)
    return norms.square_().sum(dim=tuple(dims))
