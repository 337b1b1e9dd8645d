"""Who owns what and what travels together: deterministic, balanced over owners, bounded in bytes.

Nothing here communicates. Every rank computes the same answer from the same stacks.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from normuon_plugins.core.stacks import Stack

# 128 MiB holds the matrices of one shape of a 124M model, and one 4096 x 14336 matrix of Llama-3-8B, in bfloat16.
DEFAULT_BUCKET_BYTES = 128 * 2**20
# A rank keeps the matrices that it holds whole until they are this many times an even share of all work: their exchange
# would cost more than the imbalance.
LOCAL_SHARE = 2


@dataclass(frozen=True)
class Round:
    """Stacks that travel in one message to their owners.

    Attributes:
        stacks: Their numbers.
        parts: Messages on the way back; more than one only where replicas would make one of them too large.
    """

    stacks: tuple[int, ...]
    parts: int


def choose_owners(stacks: Sequence[Stack], ranks: int) -> list[int]:
    """Return the owner of every stack: longest processing time first (Graham 1969) over their multiplications.

    A stack that only some ranks hold whole goes to the least loaded of these, where it needs no message, unless that
    would give this rank more than ``LOCAL_SHARE`` even shares. Every other stack goes to the least loaded rank.
    """
    loads = [0] * ranks
    owners = [0] * len(stacks)
    limit = LOCAL_SHARE * sum(stack.multiplications for stack in stacks) / ranks
    travelling = []
    for number in sorted(range(len(stacks)), key=lambda number: -stacks[number].multiplications):
        holders = stacks[number].whole_holders
        work = stacks[number].multiplications
        best = min(holders, key=loads.__getitem__, default=None)
        if best is None or len(holders) == ranks or (loads[best] and loads[best] + work > limit):
            travelling.append(number)
        else:
            owners[number] = best
            loads[best] += work
    heap = [(load, place) for place, load in enumerate(loads)]
    heapq.heapify(heap)
    for number in travelling:
        load, place = heap[0]
        owners[number] = place
        heapq.heapreplace(heap, (load + stacks[number].multiplications, place))
    return owners


def is_local(stack: Stack, owner: int) -> bool:
    """Return whether ``owner`` alone holds ``stack``, so that no message is needed."""
    return stack.holders == (owner,)


def plan_rounds(stacks: Sequence[Stack], owners: Sequence[int], ranks: int, bucket_bytes: int) -> list[Round]:
    """Divide the stacks that travel into rounds, the largest first.

    In one round no rank owns more than ``bucket_bytes`` and none sends more than that to owners; the largest stack of
    the round takes its place where that is larger. Owners are filled in turns, so that all of them work in every round.
    """
    queues: list[deque[int]] = [deque() for _ in range(ranks)]
    for number in sorted(range(len(stacks)), key=lambda number: -stacks[number].multiplications):
        if not is_local(stacks[number], owners[number]):
            queues[owners[number]].append(number)
    rounds = []
    while any(queues):
        chosen: list[int] = []
        bound = max(bucket_bytes, *(stacks[queue[0]].nbytes for queue in queues if queue))
        owned, sent = [0] * ranks, [0] * ranks
        # The largest first: it is taken, so that the bound is that of a stack of this round.
        open_queues = sorted((queue for queue in queues if queue), key=lambda queue: -stacks[queue[0]].nbytes)
        while open_queues:
            for queue in list(open_queues):
                stack, owner = stacks[queue[0]], owners[queue[0]]
                leaving = _sent(stack, owner)
                fits = owned[owner] + stack.nbytes <= bound and all(
                    total + more <= bound for total, more in zip(sent, leaving, strict=True) if more
                )
                # What a rank sends has neuron state on top, so that the first stack of a round may exceed the bound.
                if fits or not chosen:
                    owned[owner] += stack.nbytes
                    sent = [total + more for total, more in zip(sent, leaving, strict=True)]
                    chosen.append(queue.popleft())
                if not queue or not fits:
                    open_queues.remove(queue)
        replicas = max(stacks[number].blocks[0].replica_count for number in chosen)
        shifts_per_part = max(1, bound // max(*owned, *sent))
        rounds.append(Round(tuple(sorted(chosen)), -(-replicas // shifts_per_part)))
    return rounds


def _sent(stack: Stack, owner: int) -> list[int]:
    """Return the bytes that each rank sends to the owner: those of the owner's replica, what they hold."""
    replicas = stack.blocks[0].replicas
    return [
        held if replica == replicas[owner] and place != owner else 0
        for place, (held, replica) in enumerate(zip(stack.held, replicas, strict=True))
    ]


def plan_batches(stacks: Sequence[Stack], numbers: Iterable[int], bucket_bytes: int) -> list[list[int]]:
    """Divide the stacks called ``numbers`` into batches of equal ``key`` and at most ``bucket_bytes``.

    A single stack may be larger. Batches of one key stand together, in the order in which keys appear.
    """
    batches: dict[Hashable, list[list[int]]] = {}
    room: dict[Hashable, int] = {}
    for number in numbers:
        stack = stacks[number]
        if room.get(stack.key, 0) < stack.nbytes:
            batches.setdefault(stack.key, []).append([])
            room[stack.key] = bucket_bytes
        batches[stack.key][-1].append(number)
        room[stack.key] -= stack.nbytes
    return [batch for same in batches.values() for batch in same]
