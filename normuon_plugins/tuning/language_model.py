"""A causal language model of Hugging Face and a user's text files: the model, and batches of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normuon_plugins.extras import require

# Tokens are shorter than that on average, so that enough is read of the files, and not much more.
CHARACTERS_PER_TOKEN = 16


def load_language_model(name: str, *, fresh: bool = False) -> tuple[nn.Module, Any]:
    """Return a causal language model in float32 and its tokenizer.

    Args:
        name: Id on the hub, or a folder of ``save_pretrained``.
        fresh: Initialize the weights from the config in place of loading them: to pretrain.

    Raises:
        ImportError: If transformers is missing.
        OSError, ValueError: In transformers' words, if there is no such model or tokenizer.
    """
    require("transformers", extra="hf")
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name)
    if fresh:
        torch.manual_seed(0)
        config = AutoConfig.from_pretrained(name)
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    return model, tokenizer


def token_batches(
    files: Sequence[Path], tokenizer: Any, *, batch_size: int, sequence_length: int, count: int
) -> list[dict[str, Tensor]]:
    """Return shuffled batches for a causal language model, the same ones every time.

    Args:
        files: Text files; of each an equal part is read, from its beginning, where all of them are more than needed.
        tokenizer: Of transformers. Files are joined by its end-of-text token, if it has one.
        batch_size: Blocks of a batch.
        sequence_length: Tokens of a block.
        count: Batches wanted; fewer are returned if the text ends.

    Returns:
        Dicts with ``input_ids`` and ``labels``, each of shape ``(batch_size, sequence_length)``, int64.

    Raises:
        OSError: If a file cannot be read.
        ValueError: If the text makes fewer than two batches.
    """
    wanted = count * batch_size * sequence_length
    share = max(1, CHARACTERS_PER_TOKEN * wanted // len(files))
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stream: list[int] = []
    for file in files:
        with file.open(encoding="utf-8", errors="replace") as text:
            stream += tokenizer(text.read(share), add_special_tokens=False, verbose=False)["input_ids"] + end
    whole = stream[: len(stream) // sequence_length * sequence_length]
    blocks = torch.tensor(whole, dtype=torch.int64, device="cpu").view(-1, sequence_length)
    order = torch.randperm(len(blocks), generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    batches = blocks[order][: len(blocks) // batch_size * batch_size].view(-1, batch_size, sequence_length)[:count]
    if len(batches) < 2:
        raise ValueError(
            f"the text has {len(stream)} tokens, fewer than two batches of {batch_size} x {sequence_length}; give more"
            " text, or a smaller --batch-size or --sequence-length."
        )
    return [{"input_ids": batch, "labels": batch} for batch in batches]


def autocast_loss(device: torch.device) -> Callable[[Any, Any], Tensor] | None:
    """Return the loss under bfloat16 autocast on CUDA, as one trains there; None, the plain one, elsewhere."""
    if device.type != "cuda":
        return None

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            found: Tensor = model(**batch).loss
        return found

    return loss
