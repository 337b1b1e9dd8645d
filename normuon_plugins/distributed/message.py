"""One message of every rank to every other: pieces of several dtypes in one buffer of bytes each way."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from normuon_plugins.distributed.boxes import Piece

# Tensors of several dtypes share one buffer; 16 bytes let every one be copied with vector instructions.
ALIGNMENT = 16


@dataclass(frozen=True)
class Route:
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


class Message:
    """One ``all_to_all_single``: the routes to and from every rank, laid out in one buffer of bytes each way."""

    def __init__(self, group: dist.ProcessGroup | None, ranks: int, *, note_bytes: int = 0, idle: bool = False) -> None:
        self.group = group
        self.idle = idle
        self.note_bytes = 0 if idle else -(-note_bytes // ALIGNMENT) * ALIGNMENT
        self.sends: list[list[Route]] = [[] for _ in range(ranks)]
        self.receives: list[list[Route]] = [[] for _ in range(ranks)]

    def start(
        self, value: Callable[[Route], Tensor | None], device: torch.device, note: Tensor | None = None
    ) -> Pending:
        """Send without waiting: of every route what ``value`` returns, zeros for None, and ``note`` to every rank."""
        if self.idle:
            return Pending(None, None, self)
        send_sizes, receive_sizes = (self._sizes(side) for side in (self.sends, self.receives))
        outgoing = torch.empty(sum(send_sizes), dtype=torch.uint8, device=device)
        segments = torch.split(outgoing, send_sizes)
        if note is not None and self.note_bytes:
            torch._foreach_copy_([segment[: note.numel()] for segment in segments], [note] * len(segments))
        for segment, routes in zip(segments, self.sends, strict=True):
            for route, target in self.unpack(segment, routes):
                found = value(route)
                if found is None:
                    target.zero_()
                else:
                    target.copy_(found)
        incoming = torch.empty(sum(receive_sizes), dtype=torch.uint8, device=device)
        work = dist.all_to_all_single(incoming, outgoing, receive_sizes, send_sizes, group=self.group, async_op=True)
        return Pending(work, incoming, self, outgoing)

    def _sizes(self, side: list[list[Route]]) -> list[int]:
        return [self.note_bytes + sum(route.nbytes for route in routes) for routes in side]

    def segments(self, incoming: Tensor) -> Sequence[Tensor]:
        """Return what came from every rank."""
        return torch.split(incoming, self._sizes(self.receives))

    def unpack(self, segment: Tensor, routes: Sequence[Route]) -> Iterator[tuple[Route, Tensor]]:
        """Yield every route with its part of a segment, as a tensor of its shape and dtype."""
        offset = self.note_bytes
        for route in routes:
            size = math.prod(route.piece.shape) * route.dtype.itemsize
            yield route, segment[offset : offset + size].view(route.dtype).view(route.piece.shape)
            offset += route.nbytes


class Pending:
    """A message on its way."""

    def __init__(
        self, work: dist.Work | None, incoming: Tensor | None, message: Message, outgoing: Tensor | None = None
    ) -> None:
        self._work, self._incoming, self._message = work, incoming, message
        self._outgoing = outgoing  # must live until the message has left

    def wait(self) -> Iterator[tuple[Route, Tensor]]:
        """Wait, then yield every route with what arrived for it; once, since the memory is let go of at the end."""
        incoming = self._arrive()
        if incoming is not None:
            for segment, routes in zip(self._message.segments(incoming), self._message.receives, strict=True):
                yield from self._message.unpack(segment, routes)
            _let_go(incoming)

    def notes(self) -> list[Tensor]:
        """Wait, then return the notes by rank, padded with anything to a multiple of ``ALIGNMENT`` bytes.

        Empty if this message has none.
        """
        if not self._message.note_bytes:
            return []
        incoming = self._arrive()
        assert incoming is not None
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
