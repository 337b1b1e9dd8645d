"""The models of the comparison, and how long each is trained."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """A decoder (Llama) and its training.

    Attributes:
        width: Hidden size, a multiple of 64.
        layers: Decoder layers.
        vocabulary: Size of the tokenizer that is trained on the text.
        sequence_length: Tokens per example.
        batch_size: Examples per step.
        steps: Optimizer steps.
    """

    width: int
    layers: int
    vocabulary: int
    sequence_length: int
    batch_size: int
    steps: int


# Parameters: 1.97, 9.6 and 124 million.
SIZES = {
    "2m": Size(width=192, layers=4, vocabulary=1024, sequence_length=128, batch_size=8, steps=120),
    "10m": Size(width=384, layers=5, vocabulary=2048, sequence_length=128, batch_size=8, steps=200),
    "124m": Size(width=768, layers=12, vocabulary=50304, sequence_length=1024, batch_size=32, steps=2000),
}
