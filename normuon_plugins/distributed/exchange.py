"""The movement between storage layout (every rank its block) and compute layout (whole boxes, each on its owner).

An exchange is planned once from boxes alone and then run at every step. It moves any tensors of known boxes and knows
nothing of what they mean: who plans it says which boxes travel to whom, who runs it says where the numbers are read and
written. What a rank holds of a box that it owns never enters a message, so one process is the case without messages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from normuon_plugins.distributed.boxes import Box, Piece, numel, pieces, shared
from normuon_plugins.distributed.placement import Blocks

# Tensors of several dtypes share one buffer; 16 bytes let every one be copied with vector instructions.
ALIGNMENT = 16

# Returns the part of a stored tensor that a piece names, as a view.
Cut = Callable[[Tensor], Tensor]
# (item, field, cut) -> what to send of this rank's block.
Read = Callable[[int, int, Cut], Tensor]
# (item, field) -> the whole box, on its owner, with dimensions in storage order.
Whole = Callable[[int, int], Tensor]
# (item, field, cut, value) -> None; takes what came back for this rank's block.
Write = Callable[[int, int, Cut, Tensor], None]


@dataclass(frozen=True)
class Field:
    """One tensor of an item.

    Attributes:
        blocks: Where the stored tensor lies.
        box: The part of it that travels, by global indices.
        dtype: In which it travels.
        returns: Whether it travels back; else the owner alone reads what arrived.
    """

    blocks: Blocks
    box: Box
    dtype: torch.dtype
    returns: bool = True


@dataclass(frozen=True)
class Item:
    """What travels to one owner together.

    Attributes:
        owner: Place of the owner among the ranks.
        fields: The tensors; the first decides which replica a rank belongs to.
    """

    owner: int
    fields: tuple[Field, ...]

    def shift(self, place: int) -> int:
        """Return how many replicas ``place`` stands behind the owner's."""
        blocks = self.fields[0].blocks
        return (blocks.replicas[place] - blocks.replicas[self.owner]) % blocks.replica_count

    def sources(self, field: Field) -> Iterator[int]:
        """Yield the places that send ``field`` to the owner: its own replica, which holds everything once."""
        replicas = field.blocks.replicas
        return (place for place, replica in enumerate(replicas) if replica == replicas[self.owner])

    def returns_to(self, place: int) -> bool:
        """Return whether any of it travels back to ``place``."""
        return any(field.returns and shared(field.blocks.boxes[place], field.box) for field in self.fields)

    def is_whole_at(self, place: int) -> bool:
        """Return whether ``place`` holds all of it."""
        return all(shared(field.blocks.boxes[place], field.box) == numel(field.box) for field in self.fields)


@dataclass(frozen=True)
class _Route:
    """One piece of one field of one item, between its owner and another rank (or the owner itself)."""

    item: int
    field: int
    piece: Piece
    dtype: torch.dtype
    returns: bool

    @cached_property
    def nbytes(self) -> int:
        """Bytes in a message, with the gap up to the next piece."""
        return -(-math.prod(self.piece.shape) * self.dtype.itemsize // ALIGNMENT) * ALIGNMENT

    def stored(self, tensor: Tensor) -> Tensor:
        """Return the piece of a rank's block."""
        return self.piece.view(tensor, 0)

    def computed(self, tensor: Tensor) -> Tensor:
        """Return the piece of a whole box."""
        return self.piece.view(tensor, 1)


class Exchange:
    """Items on their way to their owners and back.

    Args:
        items: The same on every rank, in the same order.
        place: This rank's place among the ranks.
        group: Their process group; None where nothing ever leaves this rank.
        parts: Into how many messages the way back is divided. Replicas get the same numbers one after the other, so
            that a rank never sends or receives much more than what it owns at once.
        note_bytes: Size of a note that every rank sends to every other on the way to the owners.
    """

    def __init__(
        self,
        items: Sequence[Item],
        place: int,
        group: dist.ProcessGroup | None,
        *,
        parts: int = 1,
        note_bytes: int = 0,
    ) -> None:
        self._place = place
        ranks = len(items[0].fields[0].blocks.ranks)
        self._own: list[_Route] = []
        gathered = any(not item.is_whole_at(item.owner) for item in items)
        self._out = _Message(group, ranks, note_bytes=note_bytes, idle=not (gathered or note_bytes))
        replicas = max(item.fields[0].blocks.replica_count for item in items)
        self.parts = min(parts, replicas)
        shifts_per_part = -(-replicas // self.parts)
        self._back = [
            _Message(group, ranks, idle=not any(_leaves(item, part, shifts_per_part) for item in items))
            for part in range(self.parts)
        ]
        for number, item in enumerate(items):
            self._add_routes(number, item, shifts_per_part)

    @property
    def collectives(self) -> int:
        """Number of collectives of one way to the owners and back."""
        return sum(not message.idle for message in (self._out, *self._back))

    def _add_routes(self, number: int, item: Item, shifts_per_part: int) -> None:
        """Enter the pieces that this rank sends, receives or keeps into the messages."""
        for index, field in enumerate(item.fields):
            sources = set(item.sources(field))
            for place in range(len(field.blocks.ranks)) if item.owner == self._place else (self._place,):
                back = self._back[item.shift(place) // shifts_per_part]
                for piece in pieces(field.blocks.boxes[place], field.box):
                    route = _Route(number, index, piece, field.dtype, field.returns)
                    if place == item.owner:
                        self._own.append(route)
                        continue
                    if field.returns and place == self._place:
                        back.receives[item.owner].append(route)
                    elif field.returns:
                        back.sends[place].append(route)
                    if place in sources:
                        if place == self._place:
                            self._out.sends[item.owner].append(route)
                        else:
                            self._out.receives[place].append(route)

    def start_to_owners(self, read: Read, device: torch.device, note: Tensor | None = None) -> Pending:
        """Send this rank's blocks to the owners, without waiting.

        Args:
            read: Called once per piece that leaves this rank.
            device: Where messages are kept.
            note: ``note_bytes`` bytes for every other rank.
        """
        return self._out.start(lambda route: read(route.item, route.field, route.stored), device, note)

    def finish_to_owners(self, pending: Pending, whole: Whole, chosen: Container[int]) -> None:
        """Wait, and write what arrived of the items of this rank; what is not in ``chosen`` is dropped."""
        for route, value in pending.wait():
            if route.item in chosen:
                route.computed(whole(route.item, route.field)).copy_(value)

    def gather_own(self, read: Read, whole: Whole, chosen: Container[int]) -> None:
        """Write what this rank holds itself of its chosen items; read only now, and never part of a message."""
        for route in self._own:
            if route.item in chosen:
                route.computed(whole(route.item, route.field)).copy_(read(route.item, route.field, route.stored))

    def start_to_shards(self, part: int, whole: Whole, chosen: Container[int], device: torch.device) -> Pending:
        """Send pieces of this rank's chosen items to whoever holds them, without waiting; zeros for the rest."""
        return self._back[part].start(
            lambda route: route.computed(whole(route.item, route.field)) if route.item in chosen else None, device
        )

    def keep_own(self, whole: Whole, write: Write, chosen: Container[int]) -> None:
        """Write what this rank computed for itself."""
        for route in self._own:
            if route.returns and route.item in chosen:
                write(route.item, route.field, route.stored, route.computed(whole(route.item, route.field)))

    def finish_to_shards(self, pending: Pending, write: Write, chosen: Container[int]) -> None:
        """Wait, and write what the owners computed for this rank."""
        for route, value in pending.wait():
            if route.item in chosen:
                write(route.item, route.field, route.stored, value)


def _leaves(item: Item, part: int, shifts_per_part: int) -> bool:
    """Return whether anything of ``item`` goes to another rank in this part of the way back."""
    places = range(len(item.fields[0].blocks.ranks))
    return any(
        place != item.owner and item.shift(place) // shifts_per_part == part and item.returns_to(place)
        for place in places
    )


class _Message:
    """One ``all_to_all_single``: the routes to and from every rank, laid out in one buffer of bytes each way."""

    def __init__(self, group: dist.ProcessGroup | None, ranks: int, *, note_bytes: int = 0, idle: bool = False) -> None:
        self.group = group
        self.idle = idle
        self.note_bytes = -(-note_bytes // ALIGNMENT) * ALIGNMENT
        self.sends: list[list[_Route]] = [[] for _ in range(ranks)]
        self.receives: list[list[_Route]] = [[] for _ in range(ranks)]

    def start(
        self, value: Callable[[_Route], Tensor | None], device: torch.device, note: Tensor | None = None
    ) -> Pending:
        if self.idle:
            return Pending(None, None, self)
        send_sizes, receive_sizes = (self._sizes(side) for side in (self.sends, self.receives))
        outgoing = torch.empty(sum(send_sizes), dtype=torch.uint8, device=device)
        for segment, routes in zip(torch.split(outgoing, send_sizes), self.sends, strict=True):
            if note is not None:
                segment[: note.numel()].copy_(note)
            for route, target in self.unpack(segment, routes):
                found = value(route)
                if found is None:
                    target.zero_()
                else:
                    target.copy_(found)
        incoming = torch.empty(sum(receive_sizes), dtype=torch.uint8, device=device)
        work = dist.all_to_all_single(incoming, outgoing, receive_sizes, send_sizes, group=self.group, async_op=True)
        return Pending(work, incoming, self, outgoing)

    def _sizes(self, side: list[list[_Route]]) -> list[int]:
        return [self.note_bytes + sum(route.nbytes for route in routes) for routes in side]

    def segments(self, incoming: Tensor) -> Sequence[Tensor]:
        return torch.split(incoming, self._sizes(self.receives))

    def unpack(self, segment: Tensor, routes: Sequence[_Route]) -> Iterator[tuple[_Route, Tensor]]:
        """Yield every route with its part of a segment, as a tensor of its shape and dtype."""
        offset = self.note_bytes
        for route in routes:
            size = math.prod(route.piece.shape) * route.dtype.itemsize
            yield route, segment[offset : offset + size].view(route.dtype).view(route.piece.shape)
            offset += route.nbytes


class Pending:
    """A message on its way."""

    def __init__(
        self, work: dist.Work | None, incoming: Tensor | None, message: _Message, outgoing: Tensor | None = None
    ) -> None:
        self._work, self._incoming, self._message = work, incoming, message
        self._outgoing = outgoing  # must live until the message has left

    def wait(self) -> Iterator[tuple[_Route, Tensor]]:
        """Wait, then yield every route with what arrived for it; once, since the memory is let go of at the end."""
        incoming = self._arrive()
        if incoming is not None:
            for segment, routes in zip(self._message.segments(incoming), self._message.receives, strict=True):
                yield from self._message.unpack(segment, routes)
            _let_go(incoming)

    def notes(self) -> list[Tensor]:
        """Wait, then return the notes by rank, padded with anything to a multiple of ``ALIGNMENT`` bytes."""
        incoming = self._arrive()
        if incoming is None:
            return []
        return [segment[: self._message.note_bytes] for segment in self._message.segments(incoming)]

    def _arrive(self) -> Tensor | None:
        if self._work is not None:
            self._work.wait()
            if self._outgoing is not None:
                _let_go(self._outgoing)
            self._work = self._outgoing = None
        return self._incoming


def _let_go(buffer: Tensor) -> None:
    """Free the memory of a finished message at once: gloo's threads hold on to the tensor for a while."""
    buffer.untyped_storage().resize_(0)
