"""TrainingArguments in, options of ``build_normuon`` out."""

from __future__ import annotations

import inspect
import warnings
from collections import Counter
from dataclasses import fields
from typing import Any

from transformers import TrainingArguments

from normuon_plugins.core.build import OPTIMIZER_OPTIONS, PLAN_OPTIONS
from normuon_plugins.core.optimizer import NorMuon
from normuon_plugins.hf_trainer.overrides import FILE_KEY, SINGLE_KEY, collect_overrides

# Options that a string of key=value pairs cannot express, or that a field of TrainingArguments already sets.
NOT_IN_OPTIM_ARGS = {"lr", "weight_decay", "overrides", "orthogonalize_fn", "process_group"}
OPTIM_ARGS = tuple(sorted({*OPTIMIZER_OPTIONS, *PLAN_OPTIONS} - NOT_IN_OPTIM_ARGS))


def normuon_options(args: TrainingArguments) -> dict[str, Any]:
    """Translate the Trainer's arguments.

    Args:
        args: ``learning_rate`` and ``weight_decay`` are taken as they are; ``adam_beta1``, ``adam_beta2`` and
            ``adam_epsilon`` reach the AdamW groups where they differ from the fields' own defaults, which are AdamW's
            usual ones and not NorMuon's. ``optim_args`` is ``option=text,...``; a pair or triple of numbers is written
            ``0.9:0.95``. It is read here and not from the dict that the Trainer makes of it, which keeps the last of
            several ``override=``.

    Returns:
        Options for ``build_normuon``.

    Raises:
        ValueError: If a key is not an option or stands twice, or see ``collect_overrides``.

    Warns:
        UserWarning: If ``learning_rate`` is the field's own default: the arguments keep no record of what was set.
    """
    options: dict[str, Any] = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
    adam = ("adam_beta1", "adam_beta2", "adam_epsilon")
    defaults = {field.name: field.default for field in fields(TrainingArguments)}
    if args.learning_rate == defaults["learning_rate"]:
        warnings.warn(
            f"learning_rate={args.learning_rate:g} is the Trainer's default, which nobody chose for this model. Set"
            " learning_rate= to the one that AdamW has; docs/tuning.md says how to find one.",
            stacklevel=2,
        )
    changed = {name: getattr(args, name) for name in adam if getattr(args, name) != defaults[name]}
    if changed.keys() & {"adam_beta1", "adam_beta2"}:
        beta1, beta2 = inspect.signature(NorMuon).parameters["adamw_betas"].default
        options["adamw_betas"] = (changed.get("adam_beta1", beta1), changed.get("adam_beta2", beta2))
    if "adam_epsilon" in changed:
        options["adamw_eps"] = changed["adam_epsilon"]
    pairs = split_optim_args(args.optim_args)
    _check_keys([key for key, _ in pairs])
    options |= {key: parse_value(text) for key, text in pairs if key in OPTIM_ARGS}
    overrides = collect_overrides(pairs)
    return {**options, "overrides": overrides} if overrides else options


def split_optim_args(text: str | None) -> list[tuple[str, str]]:
    """Return keys and values as the Trainer itself divides them, in order and with repeated keys.

    Example:
        >>> split_optim_args("beta2=0.9, override=q_proj:adamw, override=k_proj:adamw")
        [('beta2', '0.9'), ('override', 'q_proj:adamw'), ('override', 'k_proj:adamw')]
    """
    parts = text.replace(" ", "").split(",") if text else []
    return [(key, value) for key, _, value in (part.partition("=") for part in parts)]


def parse_value(text: str) -> Any:
    """Return the number, truth value, None, tuple (``"0.9:0.95"``) or word that ``text`` spells.

    Example:
        >>> [parse_value(text) for text in ("0.95", "5", "true", "none", "0.9:0.95", "muon")]
        [0.95, 5, True, None, (0.9, 0.95), 'muon']
    """
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    if ":" in text:
        return tuple(parse_value(part) for part in text.split(":"))
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def _check_keys(keys: list[str]) -> None:
    """Raise ``ValueError`` for a key that is not an option, or that stands twice."""
    unknown = sorted(set(keys) - {*OPTIM_ARGS, FILE_KEY, SINGLE_KEY})
    if unknown:
        raise ValueError(
            f"optim_args has unknown keys {unknown}; known are {list(OPTIM_ARGS)}, {FILE_KEY}=FILE and"
            f" {SINGLE_KEY}=REGEX:TARGET. learning_rate and weight_decay are fields of their own; functions go in by"
            " Trainer(..., optimizer_cls_and_kwargs=(NorMuonFactory, {...}))."
        )
    repeated = sorted(key for key, count in Counter(keys).items() if count > 1 and key != SINGLE_KEY)
    if repeated:
        raise ValueError(f"optim_args has {repeated} more than once; only {SINGLE_KEY}=REGEX:TARGET may be repeated.")
