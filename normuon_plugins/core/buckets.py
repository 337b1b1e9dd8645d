"""What is computed together: matrices of one shape in one batch, bounded in bytes."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Stack:
    """Matrices of one shape that lie in one parameter.

    Attributes:
        key: Everything that must agree for two stacks to be multiplied in one batch: shape, dtype, device, options.
        count: Number of matrices.
        matrix_bytes: Bytes of one matrix in the batch.
    """

    key: Hashable
    count: int
    matrix_bytes: int


@dataclass(frozen=True)
class Slice:
    """Matrices ``start`` to ``stop`` (exclusive) of stack number ``index``."""

    index: int
    start: int
    stop: int


def plan_buckets(stacks: Sequence[Stack], bucket_bytes: int) -> list[list[Slice]]:
    """Divide stacks into batches of equal ``key`` and at most ``bucket_bytes`` each.

    A stack that does not fit into what is left of a bucket is divided; a single matrix larger than ``bucket_bytes``
    gets a bucket of its own. The result depends on the arguments alone, in their order, so every rank plans the same.

    Args:
        stacks: In the order of the parameters.
        bucket_bytes: Upper bound of a batch, at least 1.

    Returns:
        Every matrix of every stack exactly once; buckets of one key stand together, in the order in which keys appear.

    Example:
        >>> buckets = plan_buckets([Stack("a", 3, 10), Stack("b", 1, 10), Stack("a", 1, 10)], bucket_bytes=20)
        >>> [[(part.index, part.start, part.stop) for part in bucket] for bucket in buckets]
        [[(0, 0, 2)], [(0, 2, 3), (2, 0, 1)], [(1, 0, 1)]]
    """
    by_key: dict[Hashable, list[int]] = {}
    for index, stack in enumerate(stacks):
        by_key.setdefault(stack.key, []).append(index)
    buckets: list[list[Slice]] = []
    for indices in by_key.values():
        room = 0
        for index in indices:
            count = stacks[index].count
            capacity = max(1, bucket_bytes // stacks[index].matrix_bytes)
            start = 0
            while start < count:
                if room == 0:
                    buckets.append([])
                    room = capacity
                stop = min(count, start + room)
                buckets[-1].append(Slice(index, start, stop))
                room -= stop - start
                start = stop
    return buckets
