"""How a parameter is divided into stacks of equal matrices: what is owned, moved and multiplied together."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

import torch

from normuon_plugins.core.gradient_squares import partial_sums
from normuon_plugins.core.layout import Layout
from normuon_plugins.core.orthogonalize import multiplications
from normuon_plugins.distributed.boxes import Box, Intervals, length, numel, select, shared
from normuon_plugins.distributed.placement import Blocks

# What travels of a stack, by number: the update on the way out and the direction on the way back; the neuron state; and
# under match_progress_adamw the mean square of the gradient, and the ranks' parts of this step's, which stay out.
UPDATE, NEURONS, MEAN_SQUARE, SQUARES = range(4)


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
        boxes: Their global indices in the parameter, in its neuron state, and in what else travels.
        blocks: Where the parameter lies, its neuron state, and what else travels.
        expert_dim: The dimension of the parameter that counts them; None where the stack is one matrix.
        held: Bytes of them that each rank holds, in the dtype of the products, and of their neuron state.
        holders: Places of the ranks that hold any of it.
        multiplications: Of orthogonalizing them.
    """

    parameter: int
    shape: tuple[int, int, int]
    turned: bool
    dtype: torch.dtype
    device: torch.device
    options: Hashable
    boxes: tuple[Box, ...]
    blocks: tuple[Blocks, ...]
    expert_dim: int | None
    held: tuple[int, ...]
    holders: tuple[int, ...]
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
    def whole_holders(self) -> list[int]:
        """Places of the ranks that hold all matrices and their neuron state."""
        whole = self.nbytes + numel(self.boxes[NEURONS]) * torch.float32.itemsize
        return [place for place, held in enumerate(self.held) if held == whole]


def divide(
    parameter: int,
    layout: Layout,
    shape: tuple[int, ...],
    blocks: tuple[Blocks, ...],
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
        blocks: Where it lies, where its neuron state lies, and under ``match_progress_adamw`` where the mean square of
            its gradient does.
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
    for box, neuron_box, matrix_box, (count, rows, cols) in zip(
        layout.block_boxes(shape),
        layout.block_boxes(neuron_shape),
        layout.matrix_state_boxes(shape),
        layout.matrix_shapes(shape),
        strict=True,
    ):
        largest = max(1, min(-(-count // len(blocks[0].ranks)), bucket_bytes // (rows * cols * dtype.itemsize)))
        work = multiplications(rows, cols, ns_steps, ns_coefficients=ns_coefficients, device=device)
        for matrices in _expert_ranges(blocks[0], expert_dim, largest):
            number = length(matrices)
            boxes = tuple(
                _with_experts(each, expert_dim, matrices) for each in (box, neuron_box, matrix_box)[: len(blocks)]
            )
            held, holders = _held(blocks[:2], boxes[:2], dtype)
            stack = Stack(
                parameter,
                (number, rows, cols),
                layout.is_turned,
                dtype,
                device,
                options,
                boxes,
                blocks,
                expert_dim,
                held,
                holders,
                number * work,
            )
            stacks.append(_with_squares(stack) if len(blocks) > MEAN_SQUARE else stack)
    return stacks


def _with_squares(stack: Stack) -> Stack:
    """Return ``stack`` with the ranks' parts of the sums of squares among what travels."""
    squares, box = _partial_sums(stack.blocks[UPDATE], stack.boxes[UPDATE], stack.shape[0])
    return replace(
        stack,
        boxes=(*stack.boxes, box),
        blocks=(*stack.blocks, squares),
        holders=_join(stack.holders, stack.blocks[MEAN_SQUARE], stack.boxes[MEAN_SQUARE]),
    )


# The layers of a model ask for the same few.
_partial_sums = lru_cache(maxsize=1024)(partial_sums)


@lru_cache(maxsize=1024)
def _held(
    blocks: tuple[Blocks, ...], boxes: tuple[Box, ...], dtype: torch.dtype
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the bytes of a stack that each rank holds, and the places of those that hold any."""
    itemsizes = (dtype.itemsize, torch.float32.itemsize)
    held = tuple(
        sum(
            itemsize * shared(where.boxes[place], box)
            for itemsize, where, box in zip(itemsizes, blocks, boxes, strict=True)
        )
        for place in range(len(blocks[0].ranks))
    )
    return held, tuple(place for place, size in enumerate(held) if size)


@lru_cache(maxsize=1024)
def _join(holders: tuple[int, ...], blocks: Blocks, box: Box) -> tuple[int, ...]:
    """Return ``holders`` and the places of the ranks that hold any of ``box``.

    The block of a fused weight may lie whole on one rank, and a copy of its mean square on every rank.
    """
    more = {place for place, held in enumerate(blocks.boxes) if shared(held, box)}
    return tuple(sorted(more.union(holders)))


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
