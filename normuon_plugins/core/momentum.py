"""How momentum is stored between steps: in floating point, or as int8 with a scale for every block of a row.

The mathematics never sees the difference. It reads float32 (or wider), a piece or some rows at a time, so that no
float32 copy of more than one matrix ever exists.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from normuon_plugins.core.layout import Layout
from normuon_plugins.core.update_rules import update_momentum

MOMENTUM_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
# Numbers that share a scale: Dettmers et al., https://arxiv.org/abs/2110.02861, take 2048; torchao.optim 256, whose
# scales cost a sixty-fourth of the numbers, and which divides the widths of most models.
BLOCK = 256
LARGEST_CODE = 127
# Numbers that are read, advanced and stored at once, 4 MiB of float32. A step of 14 million int8 momenta on a CPU core
# takes 0.146 s with 2**16, 0.131 with 2**18 and 2**20, 0.132 with 2**22; a GPU starts fewer kernels with more.
CHUNK = 2**20

# Returns a part of a stored tensor, as a strided view.
Cut = Callable[[Tensor], Tensor]
# Shape and dtype of a state tensor.
Spec = tuple[tuple[int, ...], torch.dtype]


def momentum_dtype(group: Mapping[str, Any], parameter_dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which a group stores the momentum of a parameter; None is the parameter's own."""
    name = group["momentum_dtype"]
    return parameter_dtype if name is None else MOMENTUM_DTYPES[str(name).removeprefix("torch.")]


def momentum_specs(shape: Sequence[int], layout: Layout, dtype: torch.dtype) -> dict[str, Spec]:
    """Return shape and dtype of the tensors that hold the momentum of a parameter, or of a rank's block of it.

    Example:
        >>> from normuon_plugins.core.layout import parse_layout
        >>> momentum_specs((4, 300), parse_layout("o i"), torch.int8)["momentum_scale"]
        ((4, 2), torch.float32)
    """
    specs: dict[str, Spec] = {"momentum_buffer": (tuple(shape), dtype)}
    if dtype == torch.int8:
        specs["momentum_scale"] = (scale_shape(shape, layout), torch.float32)
    return specs


def row_dims(layout: Layout) -> int:
    """Return how many dimensions count rows; blocks run along what the others hold, one row of memory.

    Rows are those of the first dimension, and within each expert of the first after it.
    """
    return 1 + next(dim for dim, axis in enumerate(layout.axes) if axis != "e")


def scale_shape(shape: Sequence[int], layout: Layout) -> tuple[int, ...]:
    """Return the shape of the scales: that of the parameter, with a row's dimensions as ``1, ..., 1, blocks``."""
    rows = row_dims(layout)
    blocks = -(-math.prod(shape[rows:]) // BLOCK)
    return (*shape[:rows], *[1] * (len(shape) - rows - 1), blocks)


def check_blocks(boxes: Sequence[Sequence[Sequence[tuple[int, int]]]], shape: Sequence[int], layout: Layout) -> None:
    """Raise ``ValueError`` unless every shard of a parameter holds whole blocks of int8 momentum.

    Args:
        boxes: The global indices that each rank holds: ``[start, stop)`` ranges by dimension.
        shape: Of the parameter.
        layout: Its layout.
    """
    rows = row_dims(layout)
    is_single = len(shape) == rows + 1
    for box in boxes:
        for intervals, size in zip(box[rows:], shape[rows:], strict=True):
            for start, stop in intervals:
                aligned = is_single and start % BLOCK == 0 and (stop % BLOCK == 0 or stop == size)
                if not aligned and (start, stop) != (0, size):
                    raise ValueError(
                        f"int8 momentum has one scale per {BLOCK} numbers of a row, and a shard holds {start} to {stop}"
                        f" of {size}"
                    )


@dataclass(frozen=True)
class FloatMomentum:
    """Momentum in floating point.

    Attributes:
        buffer: This rank's block.
    """

    buffer: Tensor

    def read(self, cut: Cut, dtype: torch.dtype) -> Tensor:
        """Return a piece in ``dtype``: a view where that is the stored one."""
        return cut(self.buffer).to(dtype)

    def split(self, size: int) -> list[Momentum]:
        """Return parts of at most ``size`` entries of the first dimension."""
        return [FloatMomentum(part) for part in torch.split(self.buffer, size)]

    def load(self, dtype: torch.dtype) -> Tensor:
        """Return all of it in ``dtype``, as a copy."""
        return self.buffer.to(dtype, copy=True)

    def store(self, values: Tensor) -> None:
        """Round ``values`` to what is stored."""
        self.buffer.copy_(values)


@dataclass(frozen=True)
class Int8Momentum:
    """Momentum as int8: linear, symmetric, one scale for every ``BLOCK`` numbers of a row.

    A block with NaN or infinity has a scale that is not finite, and reads as NaN.

    Attributes:
        buffer: This rank's block, contiguous.
        scale: Its scales, contiguous.
        row_dims: See ``row_dims``.
    """

    buffer: Tensor
    scale: Tensor
    row_dims: int

    @cached_property
    def _rows(self) -> tuple[Tensor, Tensor]:
        """Codes and scales with one dimension for the rows, and one for what a row holds."""
        rows = math.prod(self.buffer.shape[: self.row_dims])
        return (
            self.buffer.view(rows, math.prod(self.buffer.shape[self.row_dims :])),
            self.scale.view(rows, self.scale.shape[-1]),
        )

    def read(self, cut: Cut, dtype: torch.dtype) -> Tensor:
        """Return a piece in ``dtype``, as a copy: only the rows that it touches are decoded."""
        codes, scales = self._rows
        # A piece is a strided view; cut from a tensor without memory, it says which part of the memory it touches.
        piece = cut(torch.empty(self.buffer.shape, dtype=torch.int8, device="meta"))
        first = int(piece.storage_offset())
        last = first + sum((size - 1) * stride for size, stride in zip(piece.shape, piece.stride(), strict=True))
        top, bottom = first // codes.shape[1], last // codes.shape[1] + 1
        values = _decode(codes[top:bottom], scales[top:bottom], dtype)
        return values.as_strided(piece.shape, piece.stride(), first - top * codes.shape[1])

    def split(self, size: int) -> list[Momentum]:
        """Return parts of at most ``size`` entries of the first dimension."""
        parts = zip(torch.split(self.buffer, size), torch.split(self.scale, size), strict=True)
        return [Int8Momentum(buffer, scale, self.row_dims) for buffer, scale in parts]

    def load(self, dtype: torch.dtype) -> Tensor:
        """Return all of it in ``dtype``, as a copy."""
        return _decode(*self._rows, dtype).view(self.buffer.shape)

    def store(self, values: Tensor) -> None:
        """Round ``values`` to the nearest code; the same on every rank that holds the same."""
        codes, scales = self._rows
        _encode(values.reshape(codes.shape), codes, scales)


Momentum = FloatMomentum | Int8Momentum


def stored_momentum(state: Mapping[str, Tensor], layout: Layout) -> Momentum:
    """Return the momentum in the state of a parameter, which consists of plain tensors: this rank's blocks."""
    if "momentum_scale" in state:
        return Int8Momentum(state["momentum_buffer"], state["momentum_scale"], row_dims(layout))
    return FloatMomentum(state["momentum_buffer"])


def advance_stored(stored: Momentum, gradient: Tensor, *, momentum: float, dtype: torch.dtype) -> None:
    """Read, advance and store some rows after the others.

    Args:
        stored: Modified in place.
        gradient: Shape of the momentum. Not modified.
        momentum: See ``update_momentum``.
        dtype: Of the values in between.
    """
    size = _entries(stored)
    for part, gradients in zip(stored.split(size), torch.split(gradient, size), strict=True):
        values = part.load(dtype)
        update_momentum(values, gradients, momentum=momentum)
        part.store(values)


def convert(source: Momentum, target: Momentum, dtype: torch.dtype) -> None:
    """Store the momentum of ``source`` in ``target``, some rows after the others, through ``dtype``."""
    size = _entries(source)
    for part, new in zip(source.split(size), target.split(size), strict=True):
        new.store(part.load(dtype))


def _entries(stored: Momentum) -> int:
    """Return how many entries of the first dimension make a chunk."""
    return max(1, CHUNK // max(1, math.prod(stored.buffer.shape[1:])))


def _blocks(rows: Tensor, scales: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return views ``(rows, blocks, size)`` of all whole blocks and of the last, shorter ones, each with its scales."""
    whole = rows.shape[1] // BLOCK
    main, rest = rows[:, : whole * BLOCK], rows[:, whole * BLOCK :]
    views = [
        (torch.unflatten(main, 1, (whole, BLOCK)), scales[:, :whole, None]),
        (rest[:, None], scales[:, whole:, None]),
    ]
    return [(view, scale) for view, scale in views if view.numel()]


def _decode(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    values = codes.to(dtype)
    for block, scale in _blocks(values, scales):
        block.mul_(scale)
    return values


def _encode(values: Tensor, codes: Tensor, scales: Tensor) -> None:
    blocks = zip(_blocks(values, scales), _blocks(codes, scales), strict=True)
    for (block, scale), (code, _) in blocks:
        largest: Tensor = torch.linalg.vector_norm(block, float("inf"), dim=-1, keepdim=True)
        # The smallest normal number keeps a block of zeros from 0 / 0, and NaN passes.
        scale.copy_(largest.div_(LARGEST_CODE).clamp_min_(torch.finfo(torch.float32).tiny))
        code.copy_((block / scale).round_().nan_to_num_(0.0, 0.0, 0.0))  # int8 holds no NaN; the scale does
