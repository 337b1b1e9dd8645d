"""Text on disk in, blocks of tokens out: shared by the three training programs."""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoTokenizer

END_OF_TEXT = "<|endoftext|>"
# Every 20th document is held out, 5 % of the corpus.
VALIDATION_EVERY = 20


class Blocks(Dataset):
    """Consecutive blocks of a token stream, each an example of its own.

    Args:
        tokens: The stream, shape ``(length,)``, integers.
        length: Tokens per block; what is left at the end is dropped.
    """

    def __init__(self, tokens: Tensor, length: int) -> None:
        if len(tokens) < length:
            raise ValueError(f"the text has {len(tokens)} tokens, less than one block of {length}; give more text")
        self.blocks = tokens[: len(tokens) // length * length].view(-1, length)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        block = self.blocks[index].long()
        return {"input_ids": block, "labels": block}


def standard_library() -> Path:
    """Return the folder of the running Python's own source code."""
    return Path(sysconfig.get_path("stdlib"))


def read_documents(paths: list[Path]) -> Iterator[str]:
    """Yield the text of every file, and of every text file below every folder, in a fixed order.

    Tests and site-packages inside a Python installation are left out: they are large and not alike between machines.
    """
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"--text {path}: no such file or folder")
        files = [path] if path.is_file() else sorted(path.rglob("*"))
        for file in files:
            inside = file.relative_to(path).parts
            if not file.is_file() or {"test", "tests", "site-packages", "idlelib", "__pycache__"} & set(inside):
                continue
            if path.is_dir() and file.suffix not in {".py", ".txt", ".md", ".rst"}:
                continue
            yield file.read_text(encoding="utf-8", errors="replace")


def load_documents(text: list[Path], dataset: str | None) -> list[str]:
    """Return the documents of ``--text`` or of the hub dataset's ``text`` column; the standard library by default."""
    if dataset:
        from datasets import load_dataset

        return list(load_dataset(dataset, split="train")["text"])
    documents = [document for document in read_documents(text or [standard_library()]) if document.strip()]
    if len(documents) == 1:  # one long file: its paragraphs are the documents
        documents = documents[0].split("\n\n")
    if len(documents) < VALIDATION_EVERY:
        raise ValueError(
            f"{len(documents)} documents cannot be divided; give at least {VALIDATION_EVERY} files or paragraphs"
        )
    return documents


def train_tokenizer(documents: list[str], vocabulary: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def encode(documents: list[str], tokenizer: Tokenizer, end_of_text: str | None) -> dict[str, Any]:
    """Return ``training`` and ``validation`` tokens (int32, one dimension), and the size of the ``vocabulary``."""
    end = [tokenizer.token_to_id(end_of_text)] if end_of_text else []
    encoded = [torch.tensor(encoding.ids + end) for encoding in tokenizer.encode_batch(documents)]
    held_out = encoded[::VALIDATION_EVERY]
    del encoded[::VALIDATION_EVERY]
    return {
        "training": torch.cat(encoded).int(),
        "validation": torch.cat(held_out).int(),
        "vocabulary": tokenizer.get_vocab_size(),
    }


def cached(cache: Path, key: list[Any], make: Callable[[], dict[str, Any]]) -> Path:
    """Return the file of tokens that ``make`` makes of what is in ``key``, written unless it is there."""
    file = cache / f"tokens-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.pt"
    if not file.exists():
        cache.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}.partial")  # every process of a run may come here at once
        torch.save(make(), partial)
        partial.replace(file)  # an interrupted run leaves no half file
    return file


def tokenize(documents: list[str], model: str | None, vocabulary: int, cache: Path) -> Path:
    """Return the file of the tokens of ``documents``, by the tokenizer of ``model`` or one trained on them."""

    def make() -> dict[str, Any]:
        if model:
            pretrained = AutoTokenizer.from_pretrained(model)
            return encode(documents, pretrained.backend_tokenizer, pretrained.eos_token)
        return encode(documents, train_tokenizer(documents, vocabulary), END_OF_TEXT)

    return cached(cache, [documents, model, vocabulary], make)


def load_corpus(
    *,
    text: list[Path],
    dataset: str | None,
    model: str | None,
    vocabulary: int,
    sequence_length: int,
    cache: Path,
) -> tuple[Blocks, Blocks, int]:
    """Return the training blocks, the validation blocks and the size of the vocabulary.

    Tokenizer and tokens are cached under ``cache``, by the content of the documents.

    Args:
        text: Files and folders; empty for the standard library.
        dataset: Name of a hub dataset, instead of ``text``.
        model: Hub name or folder whose tokenizer is used; None trains one.
        vocabulary: Size of the tokenizer that is trained.
        sequence_length: Tokens per block.
        cache: Folder, created if missing.
    """
    tokens = torch.load(tokenize(load_documents(text, dataset), model, vocabulary, cache))
    return (
        Blocks(tokens["training"], sequence_length),
        Blocks(tokens["validation"], sequence_length),
        tokens["vocabulary"],
    )
