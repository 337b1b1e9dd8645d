"""The door for those who made groups by themselves: these and their model in, a NorMuon out."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from normuon_plugins.core.build import LOGGER, take_plan_options
from normuon_plugins.core.optimizer import NorMuon
from normuon_plugins.core.parameter_plan import plan_parameters
from normuon_plugins.core.planned_groups import planned_groups
from normuon_plugins.core.planned_model import PlannedModel
from normuon_plugins.core.step_size import MATCH_PROGRESS
from normuon_plugins.core.wrappers import follow_averaging


def build_from_groups(model: nn.Module, groups: Iterable[Any], **options: Any) -> NorMuon:
    """Divide groups that somebody else made by the plan of ``model``, and return the optimizer of these groups.

    Args:
        model: That holds the parameters.
        groups: Parameters, ``(name, parameter)`` pairs or groups; see ``planned_groups``. A parameter of the model that
            is in none is not trained, as in torch.
        **options: See ``build_normuon``. A group's own ``lr`` and ``weight_decay`` count before these.

    Raises:
        TypeError: If an option is not known; or see ``planned_groups``.
        ValueError: See ``plan_parameters``, ``planned_groups`` and ``NorMuon``.

    Warns:
        UserWarning: If ``adamw_lr`` or ``adamw_weight_decay`` is given and every group has its own value.
    """
    plan_options = take_plan_options(options)
    plan_options["include_frozen"] = True  # whoever put a frozen parameter into a group thaws it later
    plan = plan_parameters(model, **plan_options)
    given = groups if isinstance(groups, Tensor) else list(groups)
    divided = planned_groups(plan, given)
    _warn_of_unread(options, given)
    options.setdefault("adjust_lr_fn", MATCH_PROGRESS)
    optimizer = NorMuon(divided, **options)
    LOGGER.info("NorMuon: the given groups became %s", [group["name"] for group in divided])
    follow_averaging(optimizer, model)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    trained = [row.name for row in plan if id(row.parameter) in held]
    left_out = [row.name for row in plan if row.parameter.requires_grad and id(row.parameter) not in held]
    optimizer._planned_model = PlannedModel(model, trained, {}, plan_options, left_out)
    return optimizer


def _warn_of_unread(options: Mapping[str, Any], given: Iterable[Any]) -> None:
    """Warn of an option for AdamW groups where each of the given groups has a value of its own."""
    for key in ("lr", "weight_decay"):
        value = options.get(f"adamw_{key}")
        if value is not None and all(isinstance(group, Mapping) and key in group for group in given):
            warnings.warn(f"adamw_{key}={value} is not read: each of the given groups has its own {key}.", stacklevel=3)
