"""The movement between storage layout (every rank its block) and compute layout (whole boxes, each on its owner).

An exchange is planned once from boxes alone and then run at every step. It moves any tensors of known boxes and knows
nothing of what they mean: who plans it says which boxes travel to whom, who runs it says where the numbers are read and
written. What a rank holds of a box that it owns never enters a message, so one process is the case without messages.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from normuon_plugins.distributed.boxes import Box, numel, pieces, shared
from normuon_plugins.distributed.message import Message, Pending, Route
from normuon_plugins.distributed.placement import Blocks

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


class Exchange:
    """Items on their way to their owners and back.

    Args:
        items: The same on every rank, in the same order.
        place: This rank's place among the ranks.
        group: Their process group; None where nothing ever leaves this rank.
        parts: Into how many messages the way back is divided. Replicas get the same numbers one after the other, so
            that a rank never sends or receives much more than what it owns at once.
        note_bytes: Size of a note that every rank sends to every other on the way to the owners.
        back_note_bytes: Size of one that travels with the first message of the way back, as one that is sent anyway.
    """

    def __init__(
        self,
        items: Sequence[Item],
        place: int,
        group: dist.ProcessGroup | None,
        *,
        parts: int = 1,
        note_bytes: int = 0,
        back_note_bytes: int = 0,
    ) -> None:
        self._place = place
        ranks = len(items[0].fields[0].blocks.ranks)
        self._own: list[Route] = []
        gathered = any(not item.is_whole_at(item.owner) for item in items)
        self._out = Message(group, ranks, note_bytes=note_bytes, idle=not (gathered or note_bytes))
        replicas = max(item.fields[0].blocks.replica_count for item in items)
        self.parts = min(parts, replicas)
        shifts_per_part = -(-replicas // self.parts)
        self._back: list[Message] = []
        for part in range(self.parts):
            idle = not any(_leaves(item, part, shifts_per_part) for item in items)
            is_first = all(message.idle for message in self._back)
            self._back.append(Message(group, ranks, note_bytes=back_note_bytes if is_first else 0, idle=idle))
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
                    route = Route(number, index, piece, field.dtype, field.returns)
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

    def start_to_shards(
        self, part: int, whole: Whole, chosen: Container[int], device: torch.device, note: Tensor | None = None
    ) -> Pending:
        """Send pieces of this rank's chosen items to whoever holds them, without waiting; zeros for the rest.

        ``note`` goes along in the first message of the way back, if it has room for one.
        """
        return self._back[part].start(
            lambda route: route.computed(whole(route.item, route.field)) if route.item in chosen else None, device, note
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
