"""Examples with labels that cost nothing, out of the source and the documentation that lie beside Python and torch."""

from __future__ import annotations

import ast
import io
import keyword
import os
import random
import textwrap
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from corpus import standard_library

# Those of some size that every Python since 3.11 has, and every torch.
PACKAGES = ("asyncio", "email", "http", "importlib", "multiprocessing", "unittest", "urllib", "xml")
SUBPACKAGES = ("_dynamo", "_inductor", "autograd", "cuda", "distributed", "fx", "nn", "utils")
# Folders that are not alike between machines.
LEFT_OUT = {"test", "tests", "site-packages"}
# What a piece of Python's source can be; its place here is its label.
KINDS = ("keyword", "definition", "call", "attribute", "argument", "name", "number", "string", "comment", "operator")
NO_KIND = -1
# Of the passages of a group, every eighth run of eight is held out: neighbours are on the same side, mostly.
RUN_LENGTH = 8
# Characters of a passage of prose, about 35 word pieces, and the fewest that say something.
PROSE, SHORTEST_PROSE = 160, 80
# Enough to draw from, in multiples of what is wanted.
SURPLUS = 2

# Its first entry is its text, which no other example has.
Example = tuple[Any, ...]


class Division(NamedTuple):
    """Examples to train on, and others to judge by."""

    training: list[Example]
    held_out: list[Example]


def divide(groups: Sequence[Iterable[Sequence[Example]]], training: int, held_out: int) -> Division:
    """Return examples in a fixed random order, as many of each group, and no text twice.

    Args:
        groups: Of every class, the examples of one file after the other, in their order.
        training: How many of each group to train on; less where a group has less.
        held_out: How many of each to judge by, likewise.

    Raises:
        ValueError: If a group has none.
    """
    seen: set[str] = set()
    found = [_divide_group(files, training, held_out, seen) for files in groups]
    shuffle = random.Random(0)
    sides = []
    for side, most in enumerate((training, held_out)):
        count = min(most, *(len(group[side]) for group in found))
        if count == 0:
            raise ValueError("this machine has too few such texts")
        sides.append([example for group in found for example in shuffle.sample(group[side], count)])
        shuffle.shuffle(sides[-1])
    return Division(*sides)


def _divide_group(files: Iterable[Sequence[Example]], training: int, held_out: int, seen: set[str]) -> Division:
    """Return the examples of a group whose text is not in ``seen``, and add it there; stop where it is enough."""
    found = Division([], [])
    for number, example in enumerate(chain.from_iterable(files)):
        if example[0] not in seen:
            seen.add(example[0])
            found[number // RUN_LENGTH % RUN_LENGTH == RUN_LENGTH - 1].append(example)
        if len(found.training) >= SURPLUS * training and len(found.held_out) >= SURPLUS * held_out:
            break
    return found


def source_files(folder: Path) -> list[Path]:
    """Return the Python files below a folder in a fixed random order, ``LEFT_OUT`` left out.

    Raises:
        FileNotFoundError: If there are none.
    """
    files = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(set(folders) - LEFT_OUT)
        files += [Path(parent) / name for name in sorted(names) if name.endswith(".py")]
    if not files:
        raise FileNotFoundError(f"{folder} has no Python source")
    random.Random(0).shuffle(files)
    return files


def library_files() -> list[Path]:
    """Return the files of ``PACKAGES``, in a fixed random order."""
    files = [file for package in PACKAGES for file in source_files(standard_library() / package)]
    random.Random(0).shuffle(files)
    return files


def packages_of_source(training: int, held_out: int) -> Division:
    """Return four lines of source, and which of ``PACKAGES`` they are from."""

    def passages(label: int, package: str) -> Iterator[list[Example]]:
        for file in source_files(standard_library() / package):
            yield [("\n".join(lines), label) for lines in _runs_of_lines(_read(file), 4)]

    groups = [passages(label, package) for label, package in enumerate(PACKAGES)]
    return divide(groups, training // len(PACKAGES), held_out // len(PACKAGES))


def subpackages_of_prose(training: int, held_out: int) -> Division:
    """Return a passage of torch's docstrings without code, and which of ``SUBPACKAGES`` it is from."""

    def passages(label: int, package: str) -> Iterator[list[Example]]:
        for file in source_files(Path(torch.__file__).parent / package):
            yield [(text, label) for docstring, _ in _documented(_read(file)) for text in _prose(docstring)]

    groups = [passages(label, package) for label, package in enumerate(SUBPACKAGES)]
    return divide(groups, training // len(SUBPACKAGES), held_out // len(SUBPACKAGES))


def kinds_of_tokens(training: int, held_out: int) -> Division:
    """Return four lines of source, and of every character its place in ``KINDS``, or ``NO_KIND``."""

    def passages() -> Iterator[list[Example]]:
        for file in library_files():
            text = _read(file)
            kinds = [kinds for line, kinds in zip(text.split("\n"), character_kinds(text), strict=True) if line.strip()]
            lines = [line for line in text.split("\n") if line.strip()]
            yield [
                ("\n".join(lines[at : at + 4]), [kind for each in kinds[at : at + 4] for kind in (*each, NO_KIND)][:-1])
                for at in range(0, len(lines) - 3, 4)
            ]

    return divide([passages()], training, held_out)


def documented_functions(training: int, held_out: int) -> Division:
    """Return what a function's docstring says first, and the function's body."""

    def passages() -> Iterator[list[Example]]:
        for file in source_files(standard_library()):
            pairs = [(_first_paragraph(docstring), body) for docstring, body in _documented(_read(file)) if body]
            yield [pair for pair in pairs if len(pair[0]) >= 20]

    return divide([passages()], training, held_out)


def lines_of_source(training: int, held_out: int) -> Division:
    """Return six lines of source each."""
    passages = ([("\n".join(lines),) for lines in _runs_of_lines(_read(file), 6)] for file in library_files())
    return divide([passages], training, held_out)


def character_kinds(text: str) -> list[list[int]]:
    """Return the place in ``KINDS`` of every character of every line of a Python program; ``NO_KIND`` between tokens.

    A name is what its neighbours make of it: defined after ``def`` or ``class``, called before a bracket, an attribute
    after a dot, an argument before ``=`` inside of brackets.
    """
    kinds = [[NO_KIND] * len(line) for line in text.split("\n")]
    silent = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    try:
        tokens = [token for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type not in silent]
    except (tokenize.TokenError, SyntaxError):
        return kinds
    depth = 0
    for number, token in enumerate(tokens):
        before = tokens[number - 1].string if number else ""
        after = tokens[number + 1].string if number + 1 < len(tokens) else ""
        depth += (token.string in "([{") - (token.string in ")]}") if token.type == tokenize.OP else 0
        kind = KINDS.index(_kind(token, before, after, bool(depth)))
        (row, begin), (last_row, end) = token.start, token.end
        for place in range(row, last_row + 1):
            line = kinds[place - 1]
            first, last = (begin if place == row else 0), (end if place == last_row else len(line))
            line[first:last] = [kind] * (min(last, len(line)) - first)
    return kinds


def _kind(token: tokenize.TokenInfo, before: str, after: str, in_brackets: bool) -> str:
    if token.type == tokenize.NAME:
        if keyword.iskeyword(token.string):
            return "keyword"
        if before in ("def", "class"):
            return "definition"
        if before == ".":
            return "attribute"
        if after == "(":
            return "call"
        return "argument" if after == "=" and in_brackets else "name"
    simple = {tokenize.NUMBER: "number", tokenize.COMMENT: "comment", tokenize.OP: "operator"}
    # from Python 3.12 on, an f-string is several tokens, all of them named so
    return simple.get(token.type, "string")


def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace")


def _runs_of_lines(text: str, count: int) -> Iterator[list[str]]:
    """Yield the lines of a text that are not blank, so many at a time."""
    lines = [line for line in text.split("\n") if line.strip()]
    for at in range(0, len(lines) - count + 1, count):
        yield lines[at : at + count]


def _documented(text: str) -> Iterator[tuple[str, str]]:
    """Yield the docstring of everything in a file that has one, and the source of a function without it."""
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return
    lines = text.split("\n")
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if docstring := ast.get_docstring(node):
            body = ""
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and len(node.body) > 1:
                body = textwrap.dedent("\n".join(lines[node.body[1].lineno - 1 : node.end_lineno]))
            yield docstring, body


def _first_paragraph(docstring: str) -> str:
    return " ".join(docstring.split("\n\n")[0].split())


def _prose(docstring: str) -> Iterator[str]:
    """Yield passages of the paragraphs that show no code."""
    for paragraph in docstring.split("\n\n"):
        if ">>>" not in paragraph and "::" not in paragraph:
            for passage in textwrap.wrap(" ".join(paragraph.split()), PROSE):
                if len(passage) >= SHORTEST_PROSE:
                    yield passage
