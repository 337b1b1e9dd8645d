"""The lines to paste: the same rates for plain PyTorch, Lightning, Accelerate and the Trainer."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from normuon_plugins.core.optimizer import NorMuon

SCALARS = (bool, int, float, str, type(None))


def lines_to_paste(rates: Mapping[str, float], options: Mapping[str, Any]) -> list[str]:
    """Return what to write in a program, in two dialects, each with the options that the trials had.

    Args:
        rates: ``lr`` and, where it has a meaning, ``adamw_lr``.
        options: Of ``build_normuon``. Those that are neither numbers nor words are named in a line of their own.

    Example:
        >>> for line in lines_to_paste({"lr": 0.016, "adamw_lr": 0.004}, {}):
        ...     print(line)
        build_normuon(model, lr=0.016, adamw_lr=0.004)
        TrainingArguments(..., optim="normuon", learning_rate=0.016, weight_decay=0.1, optim_args="adamw_lr=0.004")
    """
    written = {name: value for name, value in options.items() if is_writable(value)}
    decay = written.get("weight_decay", inspect.signature(NorMuon).parameters["weight_decay"].default)
    # The Trainer's weight_decay is 0.0 where nobody sets it, and the trials had NorMuon's.
    fields = {"optim": "normuon", "learning_rate": rates["lr"], "weight_decay": decay}
    others = {**{name: rate for name, rate in rates.items() if name != "lr"}, **written}
    others.pop("weight_decay", None)
    if others:
        fields["optim_args"] = ",".join(f"{name}={optim_arg(value)}" for name, value in others.items())
    lines = [
        f"build_normuon(model, {_keywords({**rates, **written})})",
        f"TrainingArguments(..., {_keywords(fields)})",
    ]
    left = [name for name in options if name not in written]
    return [*lines, f"# and as in the search: {', '.join(left)}"] if left else lines


def is_writable(value: Any) -> bool:
    """Return whether a value is a number, a word, a truth value, None, or a tuple of them."""
    return isinstance(value, SCALARS) or (isinstance(value, tuple) and all(isinstance(part, SCALARS) for part in value))


def optim_arg(value: Any) -> str:
    """Return a value as ``optim_args`` of the Trainer spells it.

    Example:
        >>> [optim_arg(value) for value in (0.95, True, None, (0.9, 0.95), "muon")]
        ['0.95', 'true', 'none', '0.9:0.95', 'muon']
    """
    if isinstance(value, tuple):
        return ":".join(map(optim_arg, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _keywords(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={_literal(value)}" for name, value in values.items())


def _literal(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)
