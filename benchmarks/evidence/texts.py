"""Texts of several kinds that a machine with Python and torch has already."""

from __future__ import annotations

import gzip
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from corpus import (
    END_OF_TEXT,
    VALIDATION_EVERY,
    cached,
    encode,
    load_documents,
    read_documents,
    standard_library,
    tokenize,
    train_tokenizer,
)

SYSTEM_DOCUMENTATION = (Path("/usr/share/doc"), Path("/usr/share/common-licenses"))
# Enough for every run, and tokenized in seconds.
LARGEST_TEXT = 24_000_000


def _documentation() -> Iterator[str]:
    """Yield what packages say of themselves, and licences: English, each paragraph once.

    The same licence lies on a machine a hundred times; repeated, it would be in the training and in the held-out text.
    """
    packages = Path(sysconfig.get_path("purelib"))
    files = [*packages.glob("*.dist-info/METADATA"), *packages.glob("*.dist-info/**/LICEN*")]
    for folder in SYSTEM_DOCUMENTATION:
        files += [file for file in folder.rglob("*") if file.suffix in {".txt", ".md", ".rst", ""}]
    seen: set[str] = set()
    for file in sorted(files):
        if not file.is_file():
            continue
        fresh = []
        for paragraph in file.read_text(encoding="utf-8", errors="replace").split("\n\n"):
            if (stripped := paragraph.strip()) and stripped not in seen:
                seen.add(stripped)
                fresh.append(paragraph)
        if fresh:
            yield "\n\n".join(fresh)


def _headers() -> Iterator[str]:
    """Yield torch's C++ headers."""
    for file in sorted((Path(torch.__file__).parent / "include").rglob("*.h")):
        yield file.read_text(encoding="utf-8", errors="replace")


def _files(folder: str, pattern: str) -> Iterator[str]:
    """Yield files that Debian's packages install, unpacked where they are packed."""
    for file in sorted(Path(folder).rglob(pattern)):
        if file.is_file():
            packed = file.read_bytes()
            yield (gzip.decompress(packed) if file.suffix == ".gz" else packed).decode("utf-8", errors="replace")


# The last three are there on Debian and its kin.
NAMED = {
    "python": lambda: read_documents([standard_library()]),
    "documentation": _documentation,
    "headers": _headers,
    "manual": lambda: _files("/usr/share/man/man1", "*.gz"),
    "changelogs": lambda: _files("/usr/share/doc", "changelog*.gz"),
    "perl": lambda: _files("/usr/share/perl", "*.pm"),
}


def read_text(words: list[str]) -> list[str]:
    """Return the documents of ``--text``: one of ``NAMED``, or files and folders, cut to ``LARGEST_TEXT`` characters.

    Raises:
        FileNotFoundError: If a word is neither.
        ValueError: If there are too few documents to hold some out.
    """
    if len(words) > 1 or words[0] not in NAMED:
        return _evenly(load_documents([Path(word) for word in words], None))
    documents = [document for document in NAMED[words[0]]() if document.strip()]
    if len(documents) < VALIDATION_EVERY:
        raise ValueError(f"this machine has {len(documents)} such documents; give files or folders")
    return _evenly(documents)


def _evenly(documents: list[str]) -> list[str]:
    """Return every k-th document, for the smallest k that makes the text small enough."""
    every = max(1, -(-sum(map(len, documents)) // LARGEST_TEXT))
    return documents[::every]


def tokenized(words: list[str], vocabulary: int, cache: Path) -> Path:
    """Return the file of tokens of a text, with a tokenizer of its own."""
    return tokenize(read_text(words), None, vocabulary, cache)


def tokenized_by(tokenizer_words: list[str], words: list[str], vocabulary: int, cache: Path) -> Path:
    """Return the file of tokens of a text, with the tokenizer of another one."""
    other, documents = read_text(tokenizer_words), read_text(words)
    return cached(
        cache,
        [other, documents, vocabulary],
        lambda: encode(documents, train_tokenizer(other, vocabulary), END_OF_TEXT),
    )
