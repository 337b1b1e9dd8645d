"""TrainingArguments in, options of ``build_normuon`` out."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments

from normuon_plugins.core.build import OPTIMIZER_OPTIONS, PLAN_OPTIONS, build_normuon
from normuon_plugins.core.optimizer import NorMuon

# Options that a string of key=value pairs cannot express, or that a field of TrainingArguments already sets.
NOT_IN_OPTIM_ARGS = {"lr", "weight_decay", "overrides", "orthogonalize_fn", "process_group"}
OPTIM_ARGS = tuple(sorted({*OPTIMIZER_OPTIONS, *PLAN_OPTIONS} - NOT_IN_OPTIM_ARGS))


class NorMuonFactory:
    """What the Trainer calls with the whole model, since NorMuon plans its own groups."""

    def __call__(self, model: nn.Module, **options: Any) -> NorMuon:
        """Return ``build_normuon(model, **options)``; whole parameters on several processes share the work.

        The Trainer averages the gradients of whole parameters over all processes (DDP).
        """
        if dist.is_initialized() and not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
            options.setdefault("process_group", dist.group.WORLD)
        return build_normuon(model, **options)


def normuon_options(args: TrainingArguments, optim_args: Mapping[str, str]) -> dict[str, Any]:
    """Translate the Trainer's arguments.

    Args:
        args: ``learning_rate`` and ``weight_decay`` are taken as they are; ``adam_beta1``, ``adam_beta2`` and
            ``adam_epsilon`` reach the AdamW groups where they differ from the fields' own defaults, which are AdamW's
            usual ones and not NorMuon's.
        optim_args: The parsed ``optim_args``: option -> text. A pair or triple of numbers is written ``0.9:0.95``.

    Returns:
        Options for ``build_normuon``.

    Raises:
        ValueError: If a key is not an option; the message lists those that are.
    """
    unknown = sorted(optim_args.keys() - set(OPTIM_ARGS))
    if unknown:
        raise ValueError(
            f"optim_args has unknown keys {unknown}; known are {list(OPTIM_ARGS)}."
            " learning_rate and weight_decay are fields of their own; overrides and functions go in by"
            " Trainer(..., optimizer_cls_and_kwargs=(NorMuonFactory, {...}))."
        )
    options: dict[str, Any] = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
    adam = ("adam_beta1", "adam_beta2", "adam_epsilon")
    defaults = {field.name: field.default for field in fields(TrainingArguments)}
    changed = {name: getattr(args, name) for name in adam if getattr(args, name) != defaults[name]}
    if changed.keys() & {"adam_beta1", "adam_beta2"}:
        beta1, beta2 = inspect.signature(NorMuon).parameters["adamw_betas"].default
        options["adamw_betas"] = (changed.get("adam_beta1", beta1), changed.get("adam_beta2", beta2))
    if "adam_epsilon" in changed:
        options["adamw_eps"] = changed["adam_epsilon"]
    return options | {key: parse_value(text) for key, text in optim_args.items()}


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
