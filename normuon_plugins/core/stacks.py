"""How a parameter is divided into stacks of equal matrices: what is owned, moved and multiplied together."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch

from normuon_plugins.core.layout import Layout
from normuon_plugins.core.orthogonalize import multiplications
from normuon_plugins.distributed.boxes import Box, Intervals, length, numel, select, shared
from normuon_plugins.distributed.placement import Blocks


@dataclass(frozen=True)
class Stack:
    """Some of the matrices of one fused block of one parameter.

    Attributes:
        parameter: Number of the parameter in the list that is planned.
        shape: Of the matrices as a batch: ``(count, rows, cols)``.
        turned: Whether columns, not rows, lie one after the other in memory, as the parameter is stored.
        dtype: Of the products.
        device: Where they are multiplied.
        options: Whatever else must agree within a batch.
        boxes: Their global indices in the parameter, and in its neuron state.
        blocks: Where the parameter lies, and its neuron state.
        held: Bytes of them that each rank holds, in the dtype of the products, and of their neuron state.
        multiplications: Of orthogonalizing them.
    """

    parameter: int
    shape: tuple[int, int, int]
    turned: bool
    dtype: torch.dtype
    device: torch.device
    options: Hashable
    boxes: tuple[Box, Box]
    blocks: tuple[Blocks, Blocks]
    held: tuple[int, ...]
    multiplications: int

    @property
    def nbytes(self) -> int:
        """Bytes of the matrices in the compute layout; a bucket is bounded in these."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def key(self) -> Hashable:
        """What must agree for two stacks to be multiplied in one batch."""
        return (self.shape[1:], self.turned, self.dtype, self.device, self.options)

    @property
    def holders(self) -> list[int]:
        """Places of the ranks that hold any of it."""
        return [place for place, held in enumerate(self.held) if held]

    @property
    def whole_holders(self) -> list[int]:
        """Places of the ranks that hold all of it."""
        whole = self.nbytes + numel(self.boxes[1]) * torch.float32.itemsize
        return [place for place, held in enumerate(self.held) if held == whole]


def divide(
    parameter: int,
    layout: Layout,
    shape: tuple[int, ...],
    blocks: tuple[Blocks, Blocks],
    *,
    dtype: torch.dtype,
    device: torch.device,
    ns_steps: int,
    ns_coefficients: str | Sequence[float],
    options: Hashable,
    bucket_bytes: int,
) -> list[Stack]:
    """Return the stacks of one parameter, in an order that is the same on every rank.

    Independent matrices are divided where the shards divide them, and further so that every rank can own some and none
    exceeds ``bucket_bytes`` (a single matrix may).

    Args:
        parameter: Its number.
        layout: Its layout.
        shape: Its global shape.
        blocks: Where it lies, and where its neuron state lies.
        dtype: Dtype of the products.
        device: Where they are multiplied.
        ns_steps: Newton-Schulz steps.
        ns_coefficients: Of which polynomials.
        options: Whatever else must agree within a batch.
        bucket_bytes: Upper bound of a stack.
    """
    stacks = []
    neuron_shape = layout.neuron_state_shape(shape)
    expert_dim = layout.axes.index("e") if "e" in layout.axes else None
    for box, neuron_box, (count, rows, cols) in zip(
        layout.block_boxes(shape), layout.block_boxes(neuron_shape), layout.matrix_shapes(shape), strict=True
    ):
        largest = max(1, min(-(-count // len(blocks[0].ranks)), bucket_bytes // (rows * cols * dtype.itemsize)))
        work = multiplications(rows, cols, ns_steps, ns_coefficients=ns_coefficients, device=device)
        for matrices in _expert_ranges(blocks[0], expert_dim, largest):
            number = length(matrices)
            boxes = (_with_experts(box, expert_dim, matrices), _with_experts(neuron_box, expert_dim, matrices))
            stacks.append(
                Stack(
                    parameter,
                    (number, rows, cols),
                    layout.is_turned,
                    dtype,
                    device,
                    options,
                    boxes,
                    blocks,
                    _held(blocks, boxes, dtype),
                    number * work,
                )
            )
    return stacks


@lru_cache(maxsize=1024)  # the layers of a model ask for the same few
def _held(blocks: tuple[Blocks, Blocks], boxes: tuple[Box, Box], dtype: torch.dtype) -> tuple[int, ...]:
    """Return the bytes of a stack that each rank holds."""
    itemsizes = (dtype.itemsize, torch.float32.itemsize)
    return tuple(
        sum(
            itemsize * shared(where.boxes[place], box)
            for itemsize, where, box in zip(itemsizes, blocks, boxes, strict=True)
        )
        for place in range(len(blocks[0].ranks))
    )


def _expert_ranges(blocks: Blocks, expert_dim: int | None, size: int) -> list[Intervals]:
    """Return ranges of at most ``size`` independent matrices that no shard divides."""
    if expert_dim is None:
        return [((0, 1),)]
    edges = sorted({edge for box in blocks.boxes for interval in box[expert_dim] for edge in interval})
    ranges = []
    for start, stop in pairwise(edges):
        for first in range(0, stop - start, size):
            ranges.append(select(((start, stop),), first, first + size))
    return ranges


def _with_experts(box: Box, expert_dim: int | None, matrices: Intervals) -> Box:
    """Return ``box`` with ``matrices`` in place of all experts."""
    return tuple(matrices if dim == expert_dim else intervals for dim, intervals in enumerate(box))
