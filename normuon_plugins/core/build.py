"""The one door for all adapters: a model in, a NorMuon over its planned parameters out."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from typing import Any

from torch import nn

from normuon_plugins.core.optimizer import NorMuon
from normuon_plugins.core.parameter_plan import ParameterPlan, plan_parameters
from normuon_plugins.core.planned_model import PlannedModel, Thawed
from normuon_plugins.core.step_size import MATCH_PROGRESS
from normuon_plugins.core.wrappers import follow_averaging

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


def take_plan_options(options: dict[str, Any]) -> dict[str, Any]:
    """Take those of ``plan_parameters`` out of ``options`` and return them; raise ``TypeError`` for unknown ones."""
    check_known(options)
    return {name: options.pop(name) for name in PLAN_OPTIONS if name in options}


def build_normuon(model: nn.Module, **options: Any) -> NorMuon:
    """Plan the parameters of ``model`` and return the optimizer that trains them.

    Args:
        model: Any module; wrap or shard it first where the framework wants that.
        **options: Those of ``plan_parameters`` (``overrides``, ``lora``, ``split_fused``, ...) and of ``NorMuon``
            (``lr``, ``weight_decay``, ...). Defaults are theirs, but for two. ``adjust_lr_fn`` is
            ``"match_progress_adamw"``: the learning rate that a user has from AdamW is right. ``include_frozen`` is
            True: as in ``AdamW(model.parameters())``, a layer that is frozen now trains as soon as it has a gradient.

    Raises:
        TypeError: If an option is not known; the message lists those that are.
        ValueError: See ``plan_parameters`` and ``NorMuon``.

    The first step raises ``RuntimeError`` if the model lost a parameter that was planned: it was sharded or replaced in
    between, and the optimizer would train nothing. Every later step warns, once, of a parameter of the model that has a
    gradient and is in no group; see ``add_parameters``.
    """
    plan_options = take_plan_options(options)
    plan_options.setdefault("include_frozen", True)
    plan = plan_parameters(model, **plan_options)
    groups, waiting = _divide_frozen(plan)
    options.setdefault("adjust_lr_fn", MATCH_PROGRESS)
    optimizer = NorMuon(groups, **options)  # written so, jsonargparse finds NorMuon's options
    LOGGER.info(
        "NorMuon: %d matrices with adjust_lr_fn=%r, %d other parameters on AdamW (which lr: docs/learning_rate.md)",
        sum(row.algorithm == "normuon" and row.parameter.requires_grad for row in plan),
        optimizer.defaults["adjust_lr_fn"],
        sum(row.algorithm == "adamw" and row.parameter.requires_grad for row in plan),
    )
    follow_averaging(optimizer, model)
    trained = [row.name for row in plan if row.name not in waiting]
    optimizer._planned_model = PlannedModel(model, trained, waiting, plan_options)
    return optimizer


def add_parameters(optimizer: NorMuon, model: nn.Module, **options: Any) -> list[str]:
    """Plan what ``model`` has and no group of ``optimizer`` holds, and train it from now on.

    For heads that were replaced, tokens and adapters that were added after the optimizer was built. A new parameter
    goes into the group of its kind, with that group's learning rate; where there is none, a group is added, which
    schedulers of torch that were built before do not know.

    Args:
        optimizer: Of ``build_normuon``.
        model: With the new parameters.
        **options: Those of ``plan_parameters``; what ``build_normuon`` was given, if absent.

    Returns:
        The names of the parameters that were added. Frozen ones begin when they are thawed, if their kind has a group.

    Raises:
        ValueError: See ``plan_parameters`` and ``NorMuon.add_param_group``; nothing was added.
    """
    model_of = optimizer._planned_model
    known = {} if model_of is None else model_of.options
    groups, waiting = _divide_frozen(plan_parameters(model, **{**known, **options, "include_frozen": True}))
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    by_name = {group.get("name"): group for group in optimizer.param_groups}
    added: list[str] = []
    for planned in groups:
        new = [(name, parameter) for name, parameter in planned["params"] if id(parameter) not in held]
        if not new:
            continue
        if planned["name"] not in by_name:
            optimizer.add_param_group({**planned, "params": new})
        else:
            optimizer._adopt([Thawed(name, parameter, planned["name"]) for name, parameter in new])
        added.extend(name for name, _ in new)
    if model_of is not None:
        model_of.take(added)
        # A group for frozen parameters alone would be one more, which the schedule does not know.
        kinds = {group.get("name") for group in optimizer.param_groups}
        model_of.wait({name: kind for name, kind in waiting.items() if kind in kinds})
    return added


def _divide_frozen(plan: ParameterPlan) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Return the groups of what trains, and by the names of what is frozen the name of the group that it belongs to.

    A group of frozen parameters alone is there, and empty: schedulers know the groups that exist when they are built.
    """
    groups = plan.param_groups()
    waiting: dict[str, str] = {}
    for group in groups:
        waiting |= {name: group["name"] for name, parameter in group["params"] if not parameter.requires_grad}
        group["params"] = [(name, parameter) for name, parameter in group["params"] if parameter.requires_grad]
        if not group["params"]:
            group["param_names"] = []  # torch wants names in all groups or in none
    return groups, waiting
