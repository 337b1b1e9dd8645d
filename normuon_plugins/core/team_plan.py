"""Buckets of one rank: its share of the work that ranks divide among them, with the messages that belong to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from normuon_plugins.core.buckets import choose_owners, is_local, plan_batches, plan_rounds
from normuon_plugins.core.stacks import SQUARES, Stack
from normuon_plugins.distributed.boxes import Piece, pieces
from normuon_plugins.distributed.exchange import Exchange, Field, Item

# Matrices that need no message and that a CPU, which is busy with one large one, copies at once. With 16 MiB a step on
# GPT-2's takes as long as with 128 (medians 2.81 and 2.85 s) and a tenth of the memory.
CPU_BATCH_BYTES = 16 * 2**20


class Bucket(NamedTuple):
    """Stacks that are moved together, and the batches in which this rank multiplies those it owns.

    Attributes:
        stacks: One per item of the exchange.
        exchange: Their way to the owners and back.
        batches: Numbers into ``stacks``.
        device: Where they are multiplied.
        held: What this rank holds of each stack's matrices.
    """

    stacks: list[Stack]
    exchange: Exchange
    batches: list[list[int]]
    device: torch.device
    held: list[list[Piece]]


class Buckets(NamedTuple):
    """What one rank does in a step.

    Attributes:
        owners: Of every stack, by place among the ranks.
        local: Buckets of stacks that lie whole on this rank: no message.
        rounds: Buckets that travel, in order; the same stacks on every rank.
    """

    owners: list[int]
    local: list[Bucket]
    rounds: list[Bucket]


def plan_buckets(
    stacks: Sequence[Stack],
    ranks: int,
    place: int,
    group: dist.ProcessGroup | None,
    bucket_bytes: int,
    *,
    note_bytes: int,
    back_note_bytes: int = 0,
) -> Buckets:
    """Divide ``stacks`` among ``ranks`` and return the buckets of the rank at ``place``.

    Args:
        stacks: The same on every rank, in the same order.
        ranks: Number of ranks.
        place: This rank's place among them.
        group: Their process group; None for one rank, or to plan without processes.
        bucket_bytes: Bound of a bucket.
        note_bytes: Size of the note that travels with the first round to the owners.
        back_note_bytes: Size of the one that comes back with it.
    """
    owners = choose_owners(stacks, ranks)
    here = [number for number, stack in enumerate(stacks) if owners[number] == place and is_local(stack, place)]
    on_cpu = any(stacks[number].device.type == "cpu" for number in here)
    local = [
        _bucket(stacks, owners, batch, place, None, bucket_bytes, parts=1)
        for batch in plan_batches(stacks, here, min(bucket_bytes, CPU_BATCH_BYTES) if on_cpu else bucket_bytes)
    ]
    rounds = [
        _bucket(
            stacks,
            owners,
            chosen.stacks,
            place,
            group,
            bucket_bytes,
            parts=chosen.parts,
            note_bytes=0 if rounds_before else note_bytes,
            back_note_bytes=0 if rounds_before else back_note_bytes,
        )
        for rounds_before, chosen in enumerate(plan_rounds(stacks, owners, ranks, bucket_bytes))
    ]
    return Buckets(owners, local, rounds)


def _bucket(
    stacks: Sequence[Stack],
    owners: Sequence[int],
    numbers: Sequence[int],
    place: int,
    group: dist.ProcessGroup | None,
    bucket_bytes: int,
    *,
    parts: int,
    note_bytes: int = 0,
    back_note_bytes: int = 0,
) -> Bucket:
    """Return the bucket of the stacks called ``numbers``."""
    chosen = [stacks[number] for number in numbers]
    items = [item_of(stack, owners[number]) for number, stack in zip(numbers, chosen, strict=True)]
    own = [index for index, item in enumerate(items) if item.owner == place]
    exchange = Exchange(items, place, group, parts=parts, note_bytes=note_bytes, back_note_bytes=back_note_bytes)
    held = [pieces(stack.blocks[0].boxes[place], stack.boxes[0]) for stack in chosen]
    return Bucket(chosen, exchange, plan_batches(chosen, own, bucket_bytes), chosen[0].device, held)


def item_of(stack: Stack, owner: int) -> Item:
    """Return what travels of a stack: its matrices in the dtype of the products, all else in float32."""
    dtypes = (stack.dtype, *[torch.float32] * (len(stack.boxes) - 1))
    fields = zip(stack.blocks, stack.boxes, dtypes, strict=True)
    return Item(owner, tuple(Field(*field, returns=index != SQUARES) for index, field in enumerate(fields)))
