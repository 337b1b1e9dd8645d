"""How the dimensions of a parameter read as matrices: neurons, inputs, independent matrices, fused blocks.

A layout is one short string in the order of the parameter's dimensions:

=====================  ====================================================================================
``"o i"``              ``nn.Linear``: rows are neurons
``"i o"``              Hugging Face ``Conv1D``: columns are neurons
``"o i i i"``          ``nn.Conv2d``: all input dimensions are flattened into columns
``"e o i"``            independent matrices, one per expert
``"o=8+4+4 i"``        fused blocks, one after the other; ``"o=4*8 i"`` is eight blocks of four neurons
``"o%2+2 i"``          fused blocks dealt in turns: neurons 0, 1 to the first, 2, 3 to the second, 4, 5 to
                       the first, ...
=====================  ====================================================================================

A fused block gets the update that it would get as a parameter of its own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

# Blocks of one weight: more than heads and projections ever are, and few enough to be listed.
MOST_BLOCKS = 2**16
_TOKEN = re.compile(r"(?P<axis>[oie])(?:(?P<kind>[=%])(?P<blocks>\d+(?:\*\d+)?(?:\+\d+(?:\*\d+)?)*))?")


@dataclass(frozen=True)
class Layout:
    """A parsed layout string; make one with ``parse_layout``.

    Attributes:
        spec: The string itself.
        axes: One of ``"o"``, ``"i"``, ``"e"`` per dimension of the parameter.
        blocks: Neurons of each fused block, in order; empty when the neuron axis is one block.
        interleaved: Whether the blocks are dealt in turns (``%``) instead of standing one after the other (``=``).
    """

    spec: str
    axes: tuple[str, ...]
    blocks: tuple[int, ...]
    interleaved: bool

    @property
    def is_turned(self) -> bool:
        """Whether inputs stand before neurons: in memory, the columns of a matrix lie one after the other."""
        return self.axes.index("i") < self.axes.index("o")

    def check(self, shape: Sequence[int]) -> None:
        """Raise ``ValueError`` unless a parameter of ``shape`` can be read this way."""
        if len(shape) != len(self.axes):
            raise ValueError(
                f"layout {self.spec!r} describes {len(self.axes)} dimensions; shape {tuple(shape)} has {len(shape)}"
            )
        if 0 in shape:
            raise ValueError(f"shape {tuple(shape)} has no elements")
        neurons, turn = shape[self.axes.index("o")], sum(self.blocks)
        if self.blocks and not self.interleaved and turn != neurons:
            raise ValueError(f"the blocks of layout {self.spec!r} add up to {turn}; shape {tuple(shape)} has {neurons}")
        if self.blocks and self.interleaved and neurons % turn:
            raise ValueError(f"the turn of layout {self.spec!r} is {turn}, which does not divide {neurons} neurons")

    def block_boxes(self, shape: Sequence[int]) -> list[tuple[tuple[tuple[int, int], ...], ...]]:
        """Return the indices of each fused block of a parameter of ``shape``: ``[start, stop)`` ranges by dimension.

        Example:
            >>> parse_layout("o%1+2 i").block_boxes((6, 4))
            [(((0, 1), (3, 4)), ((0, 4),)), (((1, 3), (4, 6)), ((0, 4),))]
        """
        turn = sum(self.blocks) if self.interleaved else shape[self.axes.index("o")]
        boxes = []
        start = 0
        for size in self.blocks or (turn,):
            ranges = tuple(
                (first + start, first + start + size) for first in range(0, shape[self.axes.index("o")], turn)
            )
            neurons = ranges if size < turn else ((0, shape[self.axes.index("o")]),)
            boxes.append(
                tuple(neurons if axis == "o" else ((0, extent),) for axis, extent in zip(self.axes, shape, strict=True))
            )
            start += size
        return boxes

    def storage_view(self, matrices: Tensor, shape: Sequence[int]) -> Tensor:
        """Return a view of a stack of matrices whose dimensions stand in the order of the parameter's.

        Args:
            matrices: Shape ``(count, rows, cols)``; ``count`` is 1 without an axis ``e``.
            shape: Of the parameter, or of its neuron state (then ``cols`` is 1); only input dimensions are read.
        """
        view = matrices if "e" in self.axes else matrices.squeeze(0)
        if self.axes.count("i") > 1:
            view = torch.unflatten(view, -1, [size for axis, size in zip(self.axes, shape, strict=True) if axis == "i"])
        return view.permute(self._storage_order)

    @cached_property
    def _storage_order(self) -> tuple[int, ...]:
        """For every dimension of the parameter, its place among experts, neurons and inputs."""
        order = sorted(range(len(self.axes)), key=lambda dim: "eoi".index(self.axes[dim]))
        return tuple(order.index(dim) for dim in range(len(order)))

    def matrix_shapes(self, shape: Sequence[int]) -> list[tuple[int, int, int]]:
        """Return ``(count, rows, cols)`` of the matrices in each fused block of a parameter of ``shape``."""
        sizes = list(zip(self.axes, shape, strict=True))
        count = math.prod(size for axis, size in sizes if axis == "e")
        neurons = math.prod(size for axis, size in sizes if axis == "o")
        cols = math.prod(size for axis, size in sizes if axis == "i")
        turns = neurons // sum(self.blocks) if self.interleaved else 1
        return [(count, turns * rows, cols) for rows in self.blocks or (neurons,)]

    def matrix_state_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of a state with one value per matrix: one per expert, one per fused block along the neurons.

        Example:
            >>> parse_layout("e i o=2*2+4").matrix_state_shape((6, 5, 8))
            (6, 1, 3)
        """
        return tuple(
            size if axis == "e" else len(self.blocks) or 1 if axis == "o" else 1
            for axis, size in zip(self.axes, shape, strict=True)
        )

    def matrix_state_boxes(self, shape: Sequence[int]) -> list[tuple[tuple[tuple[int, int], ...], ...]]:
        """Return the indices of each fused block's values in such a state, as ``block_boxes`` does."""
        return [
            tuple(
                ((block, block + 1),) if axis == "o" else ((0, size if axis == "e" else 1),)
                for axis, size in zip(self.axes, shape, strict=True)
            )
            for block in range(len(self.blocks) or 1)
        ]

    def neuron_state_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return ``shape`` with 1 in place of every input dimension: one value per neuron."""
        return tuple(1 if axis == "i" else size for axis, size in zip(self.axes, shape, strict=True))


@cache
def parse_layout(spec: str) -> Layout:
    """Read a layout string. Cached, since every step asks for the layout of every parameter.

    Args:
        spec: Axes separated by spaces: one ``o`` (with blocks or without), at least one ``i``, at most one ``e``.

    Raises:
        ValueError: If ``spec`` is not such a string; the message shows the grammar.

    Example:
        >>> parse_layout("e i o=2*2+4").matrix_shapes((6, 5, 8))
        [(6, 2, 5), (6, 2, 5), (6, 4, 5)]
    """
    tokens = [_TOKEN.fullmatch(word) for word in str(spec).split(" ")]
    axes = tuple(token["axis"] for token in tokens if token)
    fused = [token for token in tokens if token and token["kind"]]
    well_formed = (
        len(axes) == len(tokens)
        and axes.count("o") == 1
        and "i" in axes
        and axes.count("e") <= 1
        and all(token["axis"] == "o" for token in fused)
    )
    blocks = _parse_blocks(fused[0]["blocks"]) if fused and well_formed else ()
    if not well_formed or 0 in blocks:
        raise ValueError(
            f"layout {spec!r} is not understood; write one letter per dimension: o neurons, i inputs, e independent"
            ' matrices, for example "o i", "i o", "o i i i", "e o i", "o=2048+512+512 i", "o%64+64+64 i"'
        )
    return Layout(spec, axes, blocks, interleaved=bool(fused) and fused[0]["kind"] == "%")


def _parse_blocks(text: str) -> tuple[int, ...]:
    """Return ``(128, 128, 64)`` for ``"128*2+64"``; ``ValueError`` for more than ``MOST_BLOCKS``."""
    terms = [(int(size), int(count or 1)) for size, _, count in (term.partition("*") for term in text.split("+"))]
    if sum(count for _, count in terms) > MOST_BLOCKS:  # a layout may come from a file
        raise ValueError(f"a layout of more than {MOST_BLOCKS} blocks is not understood: {text[:40]!r}")
    return tuple(size for size, count in terms for _ in range(count))
