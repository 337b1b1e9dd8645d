"""What ranks tell each other besides matrices: one collective each, the same on every rank."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor


def create_group(
    ranks: tuple[int, ...], given: dist.ProcessGroup | None = None, others: Iterable[dist.ProcessGroup] = ()
) -> dist.ProcessGroup | None:
    """Return a process group of ``ranks`` (ascending); None for one rank.

    One that exists, if there is one: ``given``, one of ``others``, or the default one. Else a new one, for which only
    its own ranks need to call, in an order that is the same on all ranks that make several.
    """
    if len(ranks) == 1:
        return None
    world = dist.group.WORLD
    assert world is not None
    # Ranks that list the same groups in another order choose the same one.
    ordered = sorted(others, key=lambda group: (len(group.group_name), group.group_name))
    for group in (given, *ordered, world):
        if group is not None and tuple(dist.get_process_group_ranks(group)) == ranks:
            return group
    with _without_bound_device(world):
        made: dist.ProcessGroup = dist.new_group(list(ranks), use_local_synchronization=True)
    return made


@contextmanager
def _without_bound_device(world: dist.ProcessGroup) -> Iterator[None]:
    """Keep ``new_group`` from splitting the communicator of all ranks, which all of them would have to do together.

    It does so where ``init_process_group`` was given a ``device_id`` (torch 2.13, ``_new_process_group_helper``), also
    for a group of which other ranks know nothing, and would wait for them
    (https://github.com/pytorch/pytorch/pull/129965).
    """
    device = world.bound_device_id
    world.bound_device_id = None
    try:
        yield
    finally:
        world.bound_device_id = device


def check_equal(lines: Sequence[str], group: dist.ProcessGroup, device: torch.device) -> None:
    """Raise ``ValueError`` on every rank, naming the first difference, unless all ranks pass the same lines.

    Ranks that plan differently would wait for each other's messages until a timeout. A line has parts, with "; "
    between them: of one that differs the first part is shown, and those that do. Costs one all-reduce of three numbers.
    Only where they differ follow one of two numbers per line, and a gather of the first line that differs: all lines of
    a large model on many ranks would not fit on a device.
    """
    whole = _digest("\n".join(lines))
    extremes = _smallest([whole, -whole, -len(lines)], group, device)
    if extremes[0] == -extremes[1]:
        return
    count = -extremes[2]
    digests = [_digest(line) for line in lines] + [-1] * (count - len(lines))
    extremes = _smallest([*digests, *(-digest for digest in digests)], group, device)
    first = next(number for number in range(count) if extremes[number] != -extremes[count + number])
    every = [""] * dist.get_world_size(group)
    dist.all_gather_object(every, lines[first] if first < len(lines) else "nothing more", group=group)
    ranks = dist.get_process_group_ranks(group)
    rank, other = next((rank, line) for rank, line in zip(ranks, every, strict=True) if line != every[0])
    raise ValueError(
        f"ranks plan different steps: rank {ranks[0]} has {_unlike(every[0], other)}, rank {rank} has"
        f" {_unlike(other, every[0])}. Every rank must train the same parameters, in the same order, with the same"
        " options."
    )


def _unlike(line: str, other: str) -> str:
    """Return the first part of a line, and those that the other one has not."""
    first, *parts = line.split("; ")
    known = other.split("; ")
    return "; ".join([first, *(part for part in parts if part not in known)])


def _digest(words: str) -> int:
    """Return a number from 0 to ``2**56``."""
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:7], "big")


def _smallest(numbers: Sequence[int], group: dist.ProcessGroup, device: torch.device) -> list[int]:
    """Return the smallest of each number on all ranks."""
    found = torch.tensor(numbers, dtype=torch.int64, device=device)
    dist.all_reduce(found, dist.ReduceOp.MIN, group=group)
    smallest: list[int] = found.tolist()
    return smallest


def any_rank(flags: Sequence[bool], group: dist.ProcessGroup, device: torch.device) -> list[bool]:
    """Return, for every flag, whether it is set on any rank."""
    found = torch.tensor(flags, dtype=torch.int32, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=group)
    return [bool(flag) for flag in found.tolist()]


def gather_rows(row: Tensor) -> list[list[float]]:
    """Return the row of every rank of the default process group, which all call this; without one, this rank's alone.

    Args:
        row: Shape ``(width,)``, on a device that the group's backend moves.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return [row.tolist()]
    every = [torch.empty_like(row) for _ in range(dist.get_world_size())]
    dist.all_gather(every, row)
    rows: list[list[float]] = torch.stack(every).tolist()
    return rows
