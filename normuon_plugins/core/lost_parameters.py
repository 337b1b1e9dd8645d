"""Whether an optimizer still trains its model, asked at the first step.

Frameworks put new parameters in place of those that an optimizer was built on: when they shard a model, or bring it
from the meta device. An optimizer that was not told goes on with the old ones, which never get a gradient; nothing
fails, and nothing is learned.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer


def watch_for_lost_parameters(optimizer: Optimizer, model: nn.Module, names: Sequence[str]) -> None:
    """Make the first step raise ``RuntimeError`` where a parameter of ``names`` is no longer the model's.

    Args:
        optimizer: Its groups have ``param_names``. The check is done once, and does not travel with copies or through
            pickle.
        model: The model it was built for; not kept alive.
        names: FQNs of the parameters to ask about. Others, added later, may belong to no model.
    """
    watched = weakref.ref(model)
    planned = set(names)
    asked = False

    def check(stepped: Optimizer, *_: Any) -> None:
        nonlocal asked
        current = watched()
        if not asked and current is not None:
            lost = _lost(stepped, current, planned)
            if lost:
                raise RuntimeError(_message(lost, len(planned)))
        # The hook stays: removed while torch goes through all hooks, it would make those of the user fail.
        asked = True

    optimizer.register_step_pre_hook(check)


def warn_of_nothing_to_learn(param_groups: Sequence[Mapping[str, Any]]) -> None:
    """Warn that nothing has a gradient at the first step; groups that were made by hand have no model to ask."""
    count = sum(len(group["params"]) for group in param_groups)
    warnings.warn(
        f"None of the {count} parameters of this optimizer has a gradient at its first step. Was backward() called? If"
        " the model was sharded, copied or frozen (an adapter was added) after the optimizer was built, build the"
        " optimizer afterwards.",
        stacklevel=4,  # past NorMuon.step and torch's wrapper of it
    )


def _lost(optimizer: Optimizer, model: nn.Module, planned: set[str]) -> list[str]:
    """Return the names of planned parameters that the optimizer has and the model has not."""
    owned = {id(parameter) for parameter in model.parameters()}
    return [
        name
        for group in optimizer.param_groups
        for name, parameter in zip(group.get("param_names", ()), group["params"], strict=False)
        if name in planned and id(parameter) not in owned
    ]


def _message(lost: Sequence[str], planned: int) -> str:
    which = repr(lost[0]) if len(lost) == 1 else f"{lost[0]!r} and {len(lost) - 1} more"
    message = (
        f"{which} of the {planned} parameters of this optimizer: no longer in the model, which was sharded, resized,"
        " tied or changed otherwise after the optimizer was built, and would train without them. Build the optimizer"
        " afterwards."
    )
    if len(lost) < planned:
        return message
    return (
        f"{message} Fabric: setup_normuon(fabric, model), or fabric.setup_module(model) first. Accelerate:"
        " prepare_normuon(accelerator, model), or prepare(model, optimizer) in one call. fully_shard(model), then"
        " build_normuon(model)."
    )
