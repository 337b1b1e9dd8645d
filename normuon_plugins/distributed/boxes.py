"""Boxes of global indices, and views of what two of them share.

A rank's block of a tensor, a fused block of neurons and a range of experts are all the same thing: for every dimension
an ascending list of global indices, written as intervals. Where two such boxes overlap, the common part is cut into
pieces that both sides can view as strided tensors, so data moves without an index tensor and without a padding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import product

from torch import Tensor

# Ascending, disjoint, non-empty [start, stop) ranges of one dimension, in the order in which they lie in memory.
Intervals = tuple[tuple[int, int], ...]
# One list of intervals per dimension of a tensor.
Box = tuple[Intervals, ...]


def whole(shape: tuple[int, ...]) -> Box:
    """Return the box of all indices of a tensor of ``shape``."""
    return tuple(((0, size),) if size else () for size in shape)


def length(intervals: Intervals) -> int:
    """Return the number of indices in ``intervals``."""
    return sum(stop - start for start, stop in intervals)


def numel(box: Box) -> int:
    """Return the number of entries in ``box``."""
    return math.prod(map(length, box))


def select(intervals: Intervals, start: int, stop: int) -> Intervals:
    """Return the indices at places ``start`` to ``stop`` of the list that ``intervals`` stands for.

    Example:
        >>> select(((0, 4), (8, 12)), 2, 6)
        ((2, 4), (8, 10))
    """
    chosen = []
    place = 0
    for first, last in intervals:
        low, high = max(start - place, 0), min(stop - place, last - first)
        if low < high:
            chosen.append((first + low, first + high))
        place += last - first
    return tuple(chosen)


def chunk(intervals: Intervals, chunks: int, index: int) -> Intervals:
    """Return piece ``index`` of ``torch.chunk(..., chunks)``; pieces past the last are empty.

    Example:
        >>> [chunk(((0, 5),), 4, index) for index in range(4)]
        [((0, 2),), ((2, 4),), ((4, 5),), ()]
    """
    size = -(-length(intervals) // chunks)
    return select(intervals, index * size, (index + 1) * size)


def join(parts: list[Intervals]) -> Intervals:
    """Return the lists one after the other, neighbouring intervals merged."""
    joined: list[tuple[int, int]] = []
    for start, stop in (interval for part in parts for interval in part):
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return tuple(joined)


@dataclass(frozen=True)
class Run:
    """``count`` stretches of ``length`` entries, evenly spaced in each of two lists of indices.

    Attributes:
        count: Number of stretches.
        length: Entries of each, neighbours in both lists.
        starts: Place of the first entry in the first and in the second list.
        spacings: Distance from one stretch to the next in the first and in the second list.
    """

    count: int
    length: int
    starts: tuple[int, int]
    spacings: tuple[int, int]


# A step plan asks for the same few lists again and again: every layer of a model has the same shapes.
@lru_cache(maxsize=4096)
def overlap(first: Intervals, second: Intervals) -> tuple[Run, ...]:
    """Return where the indices that two lists share lie in each of them.

    Example:
        >>> overlap(((2, 6),), ((0, 1), (3, 4), (5, 8)))
        (Run(count=2, length=1, starts=(1, 1), spacings=(2, 1)),)
    """
    runs: list[Run] = []
    for here, there, size in _stretches(first, second):
        last = runs[-1] if runs else None
        if last is not None and last.length == size:
            spacings = (
                here - last.starts[0] - (last.count - 1) * last.spacings[0],
                there - last.starts[1] - (last.count - 1) * last.spacings[1],
            )
            if last.count == 1 or spacings == last.spacings:
                runs[-1] = Run(last.count + 1, size, last.starts, spacings)
                continue
        runs.append(Run(1, size, (here, there), (size, size)))
    return tuple(runs)


def _stretches(first: Intervals, second: Intervals) -> Iterator[tuple[int, int, int]]:
    """Yield ``(place in first, place in second, length)`` of every maximal common interval."""
    i = j = here = there = 0
    while i < len(first) and j < len(second):
        start, stop = max(first[i][0], second[j][0]), min(first[i][1], second[j][1])
        if start < stop:
            yield here + start - first[i][0], there + start - second[j][0], stop - start
        if first[i][1] < second[j][1]:
            here += first[i][1] - first[i][0]
            i += 1
        else:
            there += second[j][1] - second[j][0]
            j += 1


@dataclass(frozen=True)
class Piece:
    """A part that two boxes share, which both can view with strides: one run per dimension."""

    runs: tuple[Run, ...]

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Shape of both views: ``(count, length)`` per dimension, a count of one left out."""
        return tuple(
            size for run in self.runs for size in ((run.count, run.length) if run.count > 1 else (run.length,))
        )

    def view(self, tensor: Tensor, side: int) -> Tensor:
        """Return the piece of ``tensor``, which holds the first box (``side=0``) or the second (``side=1``).

        A view: writing to it writes to ``tensor``.
        """
        if tensor.shape == self.shape:  # all of it, as in one process
            return tensor
        strides = []
        offset = int(tensor.storage_offset())
        for run, stride in zip(self.runs, tensor.stride(), strict=True):
            offset += run.starts[side] * stride
            if run.count > 1:
                strides.append(run.spacings[side] * stride)
            strides.append(stride)
        return tensor.as_strided(self.shape, strides, offset)


def pieces(first: Box, second: Box) -> list[Piece]:
    """Return the parts that two boxes share, in an order that depends on the boxes alone; none if they are disjoint."""
    runs = [overlap(mine, other) for mine, other in zip(first, second, strict=True)]
    return [Piece(chosen) for chosen in product(*runs)]


def shared(first: Box, second: Box) -> int:
    """Return the number of entries that two boxes share."""
    return math.prod(
        sum(run.count * run.length for run in overlap(mine, other)) for mine, other in zip(first, second, strict=True)
    )
