"""The model that an optimizer was built for: whether it still has the parameters that were planned, and no others.

Frameworks put new parameters in place of those that an optimizer was built on, when they shard a model or bring it from
the meta device; users replace heads and add adapters. An optimizer that was not told goes on with the old ones, which
never get a gradient; nothing fails, and nothing is learned.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, NamedTuple

from torch import Tensor, nn

from normuon_plugins.core.names import unwrapped_name
from normuon_plugins.core.parameter_plan import plan_parameters
from normuon_plugins.core.planned_groups import OWN_KEYS, planned_groups

Group = Mapping[str, Any]


class Thawed(NamedTuple):
    """A parameter that was frozen when the optimizer was built, and the group that it belongs to."""

    name: str
    parameter: Tensor
    group: str


class PlannedModel:
    """Asked at every step; stays with its optimizer, and does not travel with copies or through pickle.

    Args:
        model: The model it was built for; not kept alive.
        planned: FQNs of the parameters in its groups. Others, added later, may belong to no model.
        waiting: FQNs of those that were frozen, with the names of their groups.
        options: Of ``plan_parameters``, to plan more of the model by.
        left_out: FQNs of those that whoever made the groups put into none.

    Attributes:
        has_warned: Whether it was said that something is not trained.
    """

    def __init__(
        self,
        model: nn.Module,
        planned: Iterable[str],
        waiting: Mapping[str, str],
        options: Mapping[str, Any],
        left_out: Iterable[str] = (),
    ) -> None:
        self._model = weakref.ref(model)
        self._planned = set(map(unwrapped_name, planned))
        self._settled = set(map(unwrapped_name, left_out))  # not to be warned of, or not again
        self.has_warned = False
        self._waiting: dict[str, str] = {}
        self.options = dict(options)
        self.wait(waiting)

    def wait(self, waiting: Mapping[str, str]) -> None:
        """Remember parameters that are frozen now, with the names of their groups."""
        self._waiting |= {unwrapped_name(name): group for name, group in waiting.items()}

    def take(self, names: Iterable[str]) -> list[Thawed]:
        """Return those of some parameters that wait, and let them wait no longer."""
        present, wanted = self._present(), set(map(unwrapped_name, names))
        found = [
            Thawed(name, present[name], group)
            for name, group in self._waiting.items()
            if name in wanted & present.keys()
        ]
        for name, *_ in found:
            del self._waiting[name]
        return found

    def divide(self, param_group: dict[str, Any], taken: Sequence[str]) -> list[dict[str, Any]]:
        """Return a group of the user's as the plan of the model divides it; see ``planned_groups``.

        One that says how it is trained, and one of parameters that the model does not have, stay as they are.
        """
        model = self._model()
        if model is None or OWN_KEYS & param_group.keys():
            return [param_group]
        params = param_group["params"]
        group = {**param_group, "params": [params] if isinstance(params, Tensor) else list(params)}
        own = {id(parameter) for parameter in model.parameters()}
        given = [entry[1] if isinstance(entry, tuple) else entry for entry in group["params"]]
        if own.isdisjoint(map(id, given)):
            return [group]
        divided = planned_groups(plan_parameters(model, **{**self.options, "include_frozen": True}), [group], taken)
        self.take(name for part in divided for name, _ in part["params"])
        return divided

    def check(self, param_groups: Sequence[Group], *, is_first_step: bool) -> list[Thawed]:
        """Ask whether every gradient of the model reaches the optimizer; after backward.

        A parameter that was frozen and now requires and has a gradient is trained from this step on, while something
        that was trained before still requires one, too. Where all of that is frozen, another optimizer's turn has
        begun. Any other parameter with a gradient that no group holds is not trained; where a planned one has the same
        name and no gradient, it was replaced. Costs one look at every parameter of the model.

        Args:
            param_groups: Of the optimizer, with ``param_names``.
            is_first_step: Whether nothing was trained yet.

        Returns:
            What was thawed, for the optimizer to take.

        Raises:
            RuntimeError: At the first step, if a planned parameter was replaced or is gone.

        Warns:
            UserWarning: Once for every parameter that is not trained.
        """
        model = self._model()
        if model is None:
            return []
        held = {id(parameter) for group in param_groups for parameter in group["params"]}
        if not is_first_step and not _has_other_gradients(model, held):
            return []
        own, present = _by_name(param_groups), self._present()
        if is_first_step and (lost := self._lost(own, present)):
            raise RuntimeError(_lost_message(lost, len(self._planned)))
        outside = {name: p for name, p in present.items() if id(p) not in held and p.grad is not None}
        thawed: list[Thawed] = []
        if any(parameter.requires_grad for parameter in own.values()):
            thawed = self.take(name for name, parameter in outside.items() if parameter.requires_grad)
        taken = {name for name, *_ in thawed}
        self._warn([name for name in outside if name not in taken], own)
        return thawed

    def _warn(self, outside: Sequence[str], own: Mapping[str, Tensor]) -> None:
        """Say which parameters are not trained, except those whose turn it is not, and those that FSDP2 holds twice."""
        # What waits has gradients of another optimizer, as long as what is trained here has gradients, too.
        is_idle = not any(parameter.grad is not None for parameter in own.values())
        untrained = [
            name
            for name in outside
            if name not in self._settled
            and (is_idle if name in self._waiting else name not in own or own[name].grad is None)
        ]
        if untrained:
            self._settled.update(untrained)
            self.has_warned = True
            warnings.warn(_untrained_message(untrained), stacklevel=5)  # past check, step and torch's wrapper of it

    def _present(self) -> dict[str, Tensor]:
        model = self._model()
        every = () if model is None else model.named_parameters()
        return {unwrapped_name(name): parameter for name, parameter in every}

    def _lost(self, own: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> list[str]:
        """Return the names of planned parameters without a gradient that the model has no more, or has anew.

        A parameter that FSDP2 keeps sharded while its module holds the whole one has a gradient, or neither has.
        """
        ids = {id(parameter) for parameter in present.values()}
        return [
            name
            for name, parameter in own.items()
            if name in self._planned
            and id(parameter) not in ids
            and parameter.grad is None
            and (name not in present or present[name].grad is not None)
        ]


def _has_other_gradients(model: nn.Module, held: Set[int]) -> bool:
    """Return whether a parameter that is not held has a gradient. Without names, which take most of the time."""
    return any(
        parameter is not None and id(parameter) not in held and parameter.grad is not None
        for module in model.modules()
        for parameter in module._parameters.values()
    )


def _by_name(param_groups: Sequence[Group]) -> dict[str, Tensor]:
    return {
        unwrapped_name(name): parameter
        for group in param_groups
        for name, parameter in zip(group.get("param_names", ()), group["params"], strict=False)
    }


def warn_of_nothing_to_learn(param_groups: Sequence[Group]) -> None:
    """Warn that nothing has a gradient at the first step; groups that were made by hand have no model to ask."""
    count = sum(len(group["params"]) for group in param_groups)
    warnings.warn(
        f"None of the {count} parameters of this optimizer has a gradient at its first step. Was backward() called? If"
        " the model was sharded, copied or frozen (an adapter was added) after the optimizer was built, build the"
        " optimizer afterwards.",
        stacklevel=4,  # past NorMuon.step and torch's wrapper of it
    )


def _listed(names: Sequence[str]) -> str:
    return repr(names[0]) if len(names) == 1 else f"{names[0]!r} and {len(names) - 1} more"


def _untrained_message(names: Sequence[str]) -> str:
    return (
        f"{_listed(names)} of the model: gradients that no group of this optimizer holds, so they are not trained. They"
        " were added, replaced or thawed after it was built. add_parameters(optimizer, model) trains them from now on;"
        " or build the optimizer afterwards."
    )


def _lost_message(lost: Sequence[str], planned: int) -> str:
    message = (
        f"{_listed(lost)} of the {planned} parameters of this optimizer: no longer in the model, which was sharded,"
        " resized, tied or changed otherwise after the optimizer was built, and would train without them. Build the"
        " optimizer afterwards."
    )
    if len(lost) < planned:
        return message
    return (
        f"{message} Fabric: setup_normuon(fabric, model), or fabric.setup_module(model) first. Accelerate:"
        " prepare_normuon(accelerator, model), or prepare(model, optimizer) in one call. fully_shard(model), then"
        " build_normuon(model)."
    )
