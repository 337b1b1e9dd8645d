"""What the pretrained models are fine-tuned for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from evidence.labelled_texts import (
    KINDS,
    PACKAGES,
    SUBPACKAGES,
    Division,
    documented_functions,
    kinds_of_tokens,
    lines_of_source,
    packages_of_source,
    subpackages_of_prose,
)
from evidence.tones import NOTES, tones

# Of every task at most; a run of 1,000 steps of 8 sees each example twice.
TRAINING, HELD_OUT = 4096, 512


@dataclass(frozen=True)
class Task:
    """Examples, and what is to be learned from them.

    Attributes:
        name: On the command line.
        title: Of tables and pictures.
        kind: ``"sequence"`` (a class of a text), ``"tokens"`` (a class of every word piece), ``"pairs"`` (which of a
            batch's texts goes with which), ``"masked"`` (the word pieces that are not shown) or ``"pitch"`` (of a
            tone; for CREPE, all others are for encoders of text).
        classes: To tell apart, 0 where the kind says it.
        tokens: Word pieces of a text; longer ones are cut.
        batch_size: Examples per step.
        divide: Returns the examples, given how many to train on and to judge by.
        lr: AdamW's learning rate to begin the search at, and that for LoRA.
        lora_lr: See ``lr``.
    """

    name: str
    title: str
    kind: str
    classes: int
    tokens: int
    batch_size: int
    divide: Callable[[int, int], Division]
    lr: float = 4e-4
    lora_lr: float = 8e-3


TASKS = (
    Task("library", "which package is it from", "sequence", len(PACKAGES), 32, 8, packages_of_source),
    Task("tokens", "what is each token", "tokens", len(KINDS), 48, 8, kinds_of_tokens),
    Task("docstrings", "which part of torch is described", "sequence", len(SUBPACKAGES), 40, 8, subpackages_of_prose),
    Task("pairs", "which function does it describe", "pairs", 0, 32, 16, documented_functions, lr=2e-4),
    Task("masked", "which words are hidden", "masked", 0, 48, 8, lines_of_source),
    Task("pitch", "how high is a tone in noise", "pitch", NOTES, 0, 16, tones, lr=1.6e-3),
)
