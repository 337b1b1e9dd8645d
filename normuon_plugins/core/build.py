"""The one door for all adapters: a model in, a NorMuon over its planned parameters out."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from typing import Any

from torch import nn

from normuon_plugins.core.lost_parameters import watch_for_lost_parameters
from normuon_plugins.core.optimizer import NorMuon
from normuon_plugins.core.parameter_plan import plan_parameters
from normuon_plugins.core.step_size import MATCH_PROGRESS

LOGGER = logging.getLogger("normuon_plugins")
# What each side takes besides the model or its parameters.
PLAN_OPTIONS = tuple(inspect.signature(plan_parameters).parameters)[1:]
OPTIMIZER_OPTIONS = tuple(inspect.signature(NorMuon).parameters)[1:]


def check_known(options: Mapping[str, Any], *others: str) -> None:
    """Raise ``TypeError`` for an option that nobody knows; ``others`` are those of the caller alone."""
    known = {*PLAN_OPTIONS, *OPTIMIZER_OPTIONS}
    unknown = sorted(options.keys() - known)
    if unknown:
        raise TypeError(f"unknown options {unknown}; known are {sorted(known.union(others))}.")


def build_normuon(model: nn.Module, **options: Any) -> NorMuon:
    """Plan the parameters of ``model`` and return the optimizer that trains them.

    Args:
        model: Any module; wrap or shard it first where the framework wants that.
        **options: Those of ``plan_parameters`` (``overrides``, ``lora``, ``split_fused``, ...) and of ``NorMuon``
            (``lr``, ``weight_decay``, ...). Defaults are theirs, but for ``adjust_lr_fn``, which is
            ``"match_progress_adamw"`` here: the learning rate that a user has from AdamW is right.

    Raises:
        TypeError: If an option is not known; the message lists those that are.
        ValueError: See ``plan_parameters`` and ``NorMuon``.

    The first step raises ``RuntimeError`` if the model lost a parameter that was planned: it was sharded or replaced in
    between, and the optimizer would train nothing.
    """
    check_known(options)
    plan_options = {name: options.pop(name) for name in PLAN_OPTIONS if name in options}
    plan = plan_parameters(model, **plan_options)
    options.setdefault("adjust_lr_fn", MATCH_PROGRESS)
    optimizer = NorMuon(plan.param_groups(), **options)  # written so, jsonargparse finds NorMuon's options
    LOGGER.info(
        "NorMuon: %d matrices with adjust_lr_fn=%r, %d other parameters on AdamW (which lr: docs/learning_rate.md)",
        sum(row.algorithm == "normuon" for row in plan),
        optimizer.defaults["adjust_lr_fn"],
        sum(row.algorithm == "adamw" for row in plan),
    )
    watch_for_lost_parameters(optimizer, model, [row.name for row in plan])
    return optimizer
