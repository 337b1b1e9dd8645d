"""What ranks tell each other besides matrices: one collective each, the same on every rank."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import zip_longest

import torch
import torch.distributed as dist
from torch import Tensor


def create_group(ranks: tuple[int, ...]) -> dist.ProcessGroup | None:
    """Return a process group of ``ranks`` (ascending), the default one where it has the same ranks; None for one rank.

    Only the ranks of the group need to call.
    """
    if len(ranks) == 1:
        return None
    if ranks == tuple(range(dist.get_world_size())):
        world: dist.ProcessGroup | None = dist.group.WORLD
        return world
    group: dist.ProcessGroup = dist.new_group(list(ranks), use_local_synchronization=True)
    return group


def check_equal(lines: Sequence[str], group: dist.ProcessGroup, device: torch.device) -> None:
    """Raise ``ValueError`` on every rank, naming the first difference, unless all ranks pass the same lines.

    Ranks that plan differently would wait for each other's messages until a timeout. Costs one all-reduce of two
    numbers, and a gather of the lines only when they differ.
    """
    digest = int.from_bytes(hashlib.sha256("\n".join(lines).encode()).digest()[:7], "big")
    extremes = torch.tensor([digest, -digest], dtype=torch.int64, device=device)
    dist.all_reduce(extremes, dist.ReduceOp.MIN, group=group)
    smallest, minus_largest = extremes.tolist()
    if smallest == -minus_largest:
        return
    every: list[list[str]] = [[] for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(every, list(lines), group=group)
    ranks = dist.get_process_group_ranks(group)
    for rank, others in zip(ranks, every, strict=True):
        for first, other in zip_longest(every[0], others, fillvalue="nothing more"):
            if first != other:
                raise ValueError(
                    f"ranks plan different steps: rank {ranks[0]} has {first}, rank {rank} has {other}. Every rank must"
                    " train the same parameters, in the same order, with the same options."
                )


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
