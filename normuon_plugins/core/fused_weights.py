"""How the neurons of a fused weight are divided, and the neuron axis of its layout; the facts are a table beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from normuon_plugins.core.fused_facts import (
    COMMON,
    FUSED_RAW,
    HEAD_COUNTS,
    HEAD_SIZES,
    KEYS,
    NAMED,
    QUERIES,
    VALUES,
    first_number,
)


class Fused(NamedTuple):
    """How the neurons of one weight are divided.

    Attributes:
        sizes: Neurons of each block.
        interleaved: Whether the blocks are dealt in turns of these sizes.
        heads: Neurons of one head in each block, 0 for a block without heads.
    """

    sizes: tuple[int, ...]
    interleaved: bool
    heads: tuple[int, ...]

    def fits(self, neurons: int) -> bool:
        """Return whether a weight of ``neurons`` can be divided so."""
        turn = sum(self.sizes)
        return turn > 0 and (neurons % turn == 0 if self.interleaved else turn == neurons)

    def axis(self, neurons: int, *, split_fused: bool, per_head: bool) -> str:
        """Return the neuron axis of the layout: ``"o"``, ``"o=8+4+4"``, ``"o%2+2"``."""
        if per_head and any(self.heads):
            return _contiguous(self._pieces(neurons))
        if not split_fused:
            return "o"
        if not self.interleaved or sum(self.sizes) == neurons:
            return _contiguous(self.sizes)
        return "o%" + "+".join(map(str, self.sizes))

    def _pieces(self, neurons: int) -> list[int]:
        """Return the sizes of all heads, and of the blocks without heads, in storage order."""
        turn = [
            piece
            for size, head in zip(self.sizes, self.heads, strict=True)
            for piece in ([head] * (size // head) if head and size % head == 0 else [size])
        ]
        return turn * (neurons // sum(self.sizes))


def _contiguous(sizes: Sequence[int]) -> str:
    """Return ``"o=8*2+4"`` for 8, 8, 4."""
    runs: list[list[int]] = []
    for size in sizes:
        if runs and runs[-1][0] == size:
            runs[-1][1] += 1
        else:
            runs.append([size, 1])
    if len(runs) == 1 and runs[0][1] == 1:
        return "o"
    terms = ["+".join([str(size)] * count) if count < 4 else f"{size}*{count}" for size, count in runs]
    return "o=" + "+".join(terms)


def find_fused(holder: nn.Module | None, attribute: str, neurons: int) -> Fused | None:
    """Return how ``holder``'s weight ``attribute`` is divided, or None if no fact fits.

    Args:
        holder: The module that owns the weight, or the layer that has it.
        attribute: Its name there.
        neurons: Size of the weight's neuron axis.
    """
    if holder is None:
        return None
    classes = {base.__name__ for base in type(holder).__mro__}
    attribute = FUSED_RAW.get(attribute, attribute)
    for fact in (*NAMED, *COMMON):
        if attribute != fact.attribute or (fact.holders and not classes & set(fact.holders)):
            continue
        try:
            sizes = tuple(int(size) for size in fact.sizes(holder, neurons) if size)
            heads = fact.heads(holder) if fact.heads else 0
        except (AttributeError, TypeError):  # another module of this name
            continue
        per_block = (heads,) * len(sizes) if isinstance(heads, int) else tuple(heads)
        if len(sizes) == len(per_block) and (fused := Fused(sizes, fact.interleaved, per_block)).fits(neurons):
            return fused
        if fact.holders:
            return None
    return None


def find_heads(holder: nn.Module | None, attribute: str, neurons: int) -> int | None:
    """Return the neurons of one head of an unfused query, key or value projection.

    Returns:
        0 if the projection is none of these; None if it is one and nothing tells its heads.
    """
    if attribute not in QUERIES + KEYS + VALUES:
        return 0
    for names in (("v_head_dim",) if attribute in VALUES else ("qk_head_dim",), HEAD_SIZES):
        size = first_number(holder, names)
        if size and neurons % size == 0:
            return size
    count = first_number(holder, HEAD_COUNTS)
    return neurons // count if count and neurons % count == 0 else None
