"""Overrides of the plan from ``optim_args``: a file, or one at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from normuon_plugins.core.layout import parse_layout

FILE_KEY = "overrides"
SINGLE_KEY = "override"
TARGETS = "'normuon', 'adamw' or a layout such as 'o i'"
READERS = {".json": json.loads, ".yaml": yaml.safe_load, ".yml": yaml.safe_load}


def collect_overrides(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return the overrides that ``optim_args`` asks for.

    Args:
        pairs: Keys and values of ``optim_args``, in order: ``("overrides", "plan.yaml")`` names a file that maps
            regular expressions to ``"normuon"``, ``"adamw"`` or a layout; ``("override", "down_proj:adamw")`` is one
            such entry. Other keys are passed over.

    Raises:
        ValueError: If a file cannot be read or an entry cannot be; names the file, the key, the value and the remedy.
    """
    found: dict[str, str] = {}
    for key, value in pairs:
        if key not in (FILE_KEY, SINGLE_KEY):
            continue
        source = f"optim_args='{key}={value}'"
        entries = _read_file(value, source) if key == FILE_KEY else dict([_read_single(value, source)])
        for pattern, target in entries.items():
            if pattern in found and found[pattern] != target:
                raise ValueError(
                    f"{source}: {pattern!r} is overridden to {target!r}, and to {found[pattern]!r} before; keep one."
                )
            found[pattern] = target
    return found


def _read_single(value: str, source: str) -> tuple[str, str]:
    """Return pattern and target of ``REGEX:TARGET``; the last colon divides, since ``(?:...)`` has one."""
    pattern, colon, target = value.rpartition(":")
    if not (colon and pattern):
        raise ValueError(f"{source} must be {SINGLE_KEY}=REGEX:TARGET, as in {SINGLE_KEY}=down_proj:adamw.")
    if target not in ("normuon", "adamw"):
        raise ValueError(
            f"{source}: the target of {pattern!r} is {target!r}, and must be 'normuon' or 'adamw'. The Trainer takes"
            f" spaces out of optim_args, so a layout goes into a file: optim_args='{FILE_KEY}=FILE.yaml'."
        )
    _check_pattern(pattern, source)
    return pattern, target


def _read_file(name: str, source: str) -> dict[str, str]:
    path = Path(name)
    if path.suffix not in READERS:
        raise ValueError(
            f"{source} must name a file that ends in one of {list(READERS)}; a single override is written"
            f" {SINGLE_KEY}=REGEX:TARGET."
        )
    try:
        entries = READERS[path.suffix](path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"{source}: {path.absolute()} cannot be read ({error.strerror}). The path is relative to the folder of the"
            " run, and the Trainer takes spaces out of optim_args."
        ) from None
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(
            f"{source}: {name} is not {path.suffix[1:].upper()}: {error}. In double quotes a backslash is written twice"
            ' ("\\\\.bias$").'
        ) from None
    if not (isinstance(entries, dict) and entries):
        raise ValueError(f"{source}: {name} must map regular expressions to {TARGETS}; it holds {entries!r}.")
    for pattern, target in entries.items():
        _check_pattern(pattern, f"{source}: {name}")
        _check_target(pattern, target, f"{source}: {name}")
    return entries


def _check_pattern(pattern: Any, source: str) -> None:
    try:
        re.search(pattern, "")
    except (TypeError, re.error) as error:
        raise ValueError(f"{source}: key {pattern!r} must be a regular expression: {error}.") from None


def _check_target(pattern: str, target: Any, source: str) -> None:
    if target in ("normuon", "adamw"):
        return
    try:
        parse_layout(target)
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{source}: the value of {pattern!r} is {target!r}, and must be {TARGETS}: {error}") from None
