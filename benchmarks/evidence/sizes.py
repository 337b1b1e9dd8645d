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


# The first is for trying the program. Parameters: 0.1, 2.2, 10.4 and 162 million (124 without the output head: GPT-2,
# as it is usually counted, shares it with the embedding).
SIZES = {
    "tiny": Size(width=64, layers=1, vocabulary=512, sequence_length=32, batch_size=4, steps=24),
    "2m": Size(width=192, layers=4, vocabulary=1024, sequence_length=128, batch_size=8, steps=120),
    "10m": Size(width=384, layers=5, vocabulary=2048, sequence_length=128, batch_size=8, steps=200),
    "124m": Size(width=768, layers=12, vocabulary=50304, sequence_length=1024, batch_size=32, steps=2000),
}
