"""Examples in, tensors of word pieces out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from corpus import cached
from torch import Tensor

from evidence.labelled_texts import Example
from evidence.pretrained_models import make_tokenizer, model_path
from evidence.tasks import HELD_OUT, TRAINING, Task
from evidence.tones import tone

# What the loss leaves out.
IGNORED = -100
# Devlin et al., https://arxiv.org/abs/1810.04805: of all word pieces, 15 % are to be said; of these, 80 % are hidden
# and 10 % replaced by another.
MASKED, HIDDEN, REPLACED = 0.15, 0.8, 0.1


def encoded(model: str, task: Task, cache: Path, training: int = TRAINING, held_out: int = HELD_OUT) -> Path:
    """Return the file of the ``training`` and ``held_out`` tensors of a task, as a model wants them.

    Raises:
        MissingModel: If the model is not on this machine.
        FileNotFoundError: If the texts are not.
    """
    model_path(model)  # or say what is missing, before the texts are read
    tokenizer = None if task.kind == "pitch" else make_tokenizer(model)
    division = task.divide(training, held_out)

    def make() -> dict[str, Any]:
        sides = zip(("training", "held_out"), division, strict=True)
        return {side: encode(task, tokenizer, examples) for side, examples in sides}

    return cached(cache, [model, task.name, task.tokens, division], make)


def encode(task: Task, tokenizer: Any, examples: Sequence[Example]) -> dict[str, Tensor]:
    """Return ``input_ids``, ``input_mask`` and, by the kind of the task, ``labels`` or ``other_ids``, ``other_mask``.

    Tones are ``frames`` and ``labels``.

    Args:
        task: Says the kind, and where texts are cut.
        tokenizer: A fast one; None for tones.
        examples: By ``task.divide``.
    """
    if task.kind == "pitch":
        frames = torch.stack([tone(name, pitch) for name, pitch in examples])
        return {"frames": frames, "labels": torch.tensor([pitch for _, pitch in examples])}

    def tokenize(texts: Sequence[str]) -> Any:
        options = {"truncation": True, "padding": "max_length", "max_length": task.tokens, "return_tensors": "pt"}
        return tokenizer(list(texts), return_offsets_mapping=True, return_special_tokens_mask=True, **options)

    found = tokenize([example[0] for example in examples])
    tensors = {"input_ids": found["input_ids"], "input_mask": found["attention_mask"]}
    if task.kind == "sequence":
        return {**tensors, "labels": torch.tensor([label for _, label in examples])}
    if task.kind == "tokens":
        return {**tensors, "labels": _labels_of_pieces(found, [kinds for _, kinds in examples])}
    if task.kind == "pairs":
        others = tokenize([other for _, other in examples])
        return {**tensors, "other_ids": others["input_ids"], "other_mask": others["attention_mask"]}
    return {**tensors, **_masked(found, tokenizer)}


def _labels_of_pieces(found: Any, kinds: Sequence[Sequence[int]]) -> Tensor:
    """Return the label of the character that each word piece begins with."""
    labels = torch.full_like(found["input_ids"], IGNORED)
    for row, (offsets, special) in enumerate(zip(found["offset_mapping"], found["special_tokens_mask"], strict=True)):
        for place, ((begin, _), left_out) in enumerate(zip(offsets.tolist(), special.tolist(), strict=True)):
            if not left_out and kinds[row][begin] >= 0:
                labels[row, place] = kinds[row][begin]
    return labels


def _masked(found: Any, tokenizer: Any) -> dict[str, Tensor]:
    """Return word pieces some of which are hidden, and what these were: the same for every run."""
    generator = torch.Generator().manual_seed(0)
    ids, special = found["input_ids"], found["special_tokens_mask"].bool()
    chosen = (torch.rand(ids.shape, generator=generator) < MASKED) & ~special
    fate = torch.rand(ids.shape, generator=generator)
    others = torch.randint(len(tokenizer), ids.shape, generator=generator)
    shown = torch.where(chosen & (fate < HIDDEN), tokenizer.mask_token_id, ids)
    shown = torch.where(chosen & (fate >= 1 - REPLACED), others, shown)
    return {"input_ids": shown, "labels": torch.where(chosen, ids, IGNORED)}
