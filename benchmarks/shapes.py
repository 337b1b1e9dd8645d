"""The hidden matrices of real models, as lists of shapes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import groupby
from math import prod

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Model:
    """The hidden matrices of a model.

    Attributes:
        layer: Shapes of one layer, ``(neurons, inputs)`` or ``(experts, neurons, inputs)``. Fused projections are
            divided, as ``plan_parameters`` divides them.
        layers: How many the model has.
        gpu_layers: How many fit one GPU of 80 GB for ten optimizers that each keep their state.
        cpu: What a CPU of two cores steps in about 20 seconds.
    """

    layer: tuple[Shape, ...]
    layers: int
    gpu_layers: int
    cpu: tuple[Shape, ...]

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Shapes of the whole model."""
        return self.layer * self.layers


def _llama(width: int, hidden: int, key_value: int) -> tuple[Shape, ...]:
    """Return one layer: queries and output, keys and values, gate and up, down."""
    attention = ((width, width),) * 2 + ((key_value, width),) * 2
    return (*attention, *((hidden, width),) * 2, (width, hidden))


# Queries, keys, values and output, then the two projections of the MLP.
_GPT2 = ((768, 768),) * 4 + ((3072, 768), (768, 3072))
# The Llama of https://arxiv.org/abs/2510.05491: width 2048, 5632 in the MLP, 256 for keys and values.
_LLAMA_1B = _llama(2048, 5632, 256)
_LLAMA_8B = _llama(4096, 14336, 1024)
_MIXTRAL = (*_LLAMA_8B[:4], *((8, *shape) for shape in _LLAMA_8B[4:]))

MODELS = {
    "gpt2": Model(_GPT2, layers=12, gpu_layers=12, cpu=_GPT2 * 12),
    "llama-1.1b": Model(_LLAMA_1B, layers=22, gpu_layers=22, cpu=_LLAMA_1B * 3),
    # One layer of these takes a CPU minutes: one matrix of each size, and two experts of eight.
    "llama-3-8b": Model(_LLAMA_8B, layers=32, gpu_layers=4, cpu=((4096, 4096), (1024, 4096), (14336, 4096))),
    "mixtral": Model(_MIXTRAL, layers=32, gpu_layers=1, cpu=((1024, 4096), (2, 14336, 4096))),
}


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """Return the shapes that ``text`` lists: ``"512x512*4,8x512x2048"`` is four matrices and a stack of eight.

    Raises:
        ValueError: If a word is no shape of two or three sizes.
    """
    shapes: list[Shape] = []
    for word in text.split(","):
        if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}(\*[1-9]\d*)?", word):
            raise ValueError(
                f"--shapes: {word!r} is no shape; write 512x2048, 512x2048*4 or 8x512x2048 (experts first)."
            )
        sizes, _, count = word.partition("*")
        shapes += [tuple(int(size) for size in sizes.split("x"))] * int(count or 1)
    return tuple(shapes)


def format_shapes(shapes: tuple[Shape, ...]) -> str:
    """Return what ``parse_shapes`` reads, equal shapes counted."""
    words = []
    for shape, equal in groupby(sorted(shapes)):
        count = len(list(equal))
        words.append("x".join(map(str, shape)) + (f"*{count}" if count > 1 else ""))
    return ",".join(words)


def matrices(shapes: tuple[Shape, ...]) -> list[tuple[int, int]]:
    """Return ``(rows, cols)`` of every matrix, those of a stack one by one."""
    return [(shape[-2], shape[-1]) for shape in shapes for _ in range(prod(shape[:-2]))]


def entries(shapes: tuple[Shape, ...]) -> int:
    """Return how many numbers the matrices hold."""
    return sum(prod(shape) for shape in shapes)
