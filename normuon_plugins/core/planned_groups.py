"""Parameter groups that somebody else made, divided by the plan of a model."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from normuon_plugins.core.group_options import TRAINABLE_DTYPES
from normuon_plugins.core.parameter_plan import ParameterPlan
from normuon_plugins.core.plan_table import PlannedParameter
from normuon_plugins.core.quantized import is_quantized

# What a group says that was made for NorMuon.
OWN_KEYS = frozenset({"algorithm", "layout"})


def planned_groups(plan: ParameterPlan, params: Iterable[Any], taken: Collection[str] = ()) -> list[dict[str, Any]]:
    """Return groups for ``NorMuon`` that hold the parameters of ``params``, each as ``plan`` has it.

    Args:
        plan: Of the whole model, its frozen parameters included (``include_frozen=True``).
        params: What ``torch.optim.Optimizer`` takes: parameters, ``(name, parameter)`` pairs, or group dicts. Nothing
            of it is changed. A group that says ``algorithm`` or ``layout`` was made for NorMuon, and is left as it is.
        taken: Names of groups that exist already.

    Returns:
        Every given group in its place, as one group for each algorithm, layout and decay that its parameters have in
        the plan: matrices first, the parameters of each in the order in which they were given. A group has

        - all keys of the given one, such as ``lr`` and ``initial_lr``. Its ``weight_decay`` counts for all of its
          parameters, also for those that the plan does not decay: the caller decided. Without one, the plan decides;
        - ``(name, parameter)`` pairs with the names of the plan;
        - a ``name`` that no other has: that of the plan's own group, behind that of the given one, or behind
          ``group_1`` for the second of several without a name.

        Groups without parameters are dropped, and so are frozen parameters that no optimizer could train (quantized
        ones, integers), as in the plan.

    Raises:
        ValueError: If the plan does not know a parameter, or a group has no ``params``; the message names it.
        TypeError: If something is no tensor, or ``params`` a single one or a set, as in torch.

    Example:
        >>> from torch import nn
        >>> from normuon_plugins import plan_parameters
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> given = [{"params": model[0].parameters(), "lr": 1e-5}, {"params": model[2].parameters()}]
        >>> groups = planned_groups(plan_parameters(model), given)
        >>> [(group["name"], group.get("lr"), [name for name, _ in group["params"]]) for group in groups]
        ... # doctest: +NORMALIZE_WHITESPACE
        [('group_0/normuon_o_i', 1e-05, ['0.weight']), ('group_0/adamw_no_decay', 1e-05, ['0.bias']),
         ('group_1/normuon_o_i', None, ['2.weight']), ('group_1/adamw_no_decay', None, ['2.bias'])]
    """
    rows = {id(row.parameter): row for row in plan}
    given = list(_as_groups(params))
    several = sum("name" not in group for group in given) > 1
    names = set(taken)
    groups: list[dict[str, Any]] = []
    for index, group in enumerate(given):
        called = group.get("name", f"group_{index}")
        pairs = _pairs(group, str(called))
        if any(key in group for key in OWN_KEYS):
            divided = [_left_as_it_is(group, str(called), pairs, rows)] if pairs else []
        else:
            prefix = f"{called}/" if "name" in group or several else ""
            divided = _divide(group, prefix, _planned(pairs, str(called), rows))
        for part in divided:
            part["name"] = _unique(part["name"], names)
            names.add(part["name"])
        groups += divided
    return groups


def _as_groups(params: Iterable[Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the group dicts of ``params``, one for bare parameters."""
    if isinstance(params, Tensor):
        raise TypeError("params must be an iterable of parameters or groups; got a single tensor, as if by [p] for p.")
    entries = list(params)
    yield from entries if entries and isinstance(entries[0], Mapping) else [{"params": entries}]


def _pairs(group: Mapping[str, Any], called: str) -> list[tuple[str | None, Tensor]]:
    """Return the parameters of a given group, with the names that its maker gave them."""
    if "params" not in group:
        raise ValueError(f"group {called!r} has no 'params'; its keys are {list(group)}.")
    params = group["params"]
    if isinstance(params, set):
        raise TypeError(f"params of group {called!r} is a set, whose order changes between runs; use a list.")
    entries = [params] if isinstance(params, Tensor) else list(params)
    names = group.get("param_names", [None] * len(entries))  # as a group of another optimizer has them
    pairs = [entry if isinstance(entry, tuple) else (name, entry) for name, entry in zip(names, entries, strict=True)]
    for _, parameter in pairs:
        if not isinstance(parameter, Tensor):
            raise TypeError(f"group {called!r} holds a {torch.typename(parameter)}; an optimizer takes tensors only.")
    return pairs


def _planned(
    pairs: Iterable[tuple[str | None, Tensor]], called: str, rows: Mapping[int, PlannedParameter]
) -> list[PlannedParameter]:
    """Return the rows of the parameters of a group; raise ``ValueError`` for one that has none."""
    found = []
    for index, (name, parameter) in enumerate(pairs):
        if id(parameter) in rows:
            found.append(rows[id(parameter)])
        elif not _is_left_out(parameter):
            which = f"parameter {index} of group {called!r}" if name is None else repr(name)
            raise ValueError(
                f"{which}, of shape {tuple(parameter.shape)}, is no parameter of the model that was planned. Give it a"
                " group of its own that says how it is trained: {'params': [...], 'algorithm': 'adamw'}, or"
                " 'algorithm': 'normuon' and a 'layout'."
            )
    return found


def _is_left_out(parameter: Tensor) -> bool:
    """Return whether a plan says nothing of a parameter because it is frozen and could not be trained anyway."""
    return not parameter.requires_grad and (is_quantized(parameter) or parameter.dtype not in TRAINABLE_DTYPES)


def _divide(group: Mapping[str, Any], prefix: str, planned: Iterable[PlannedParameter]) -> list[dict[str, Any]]:
    """Return the groups of one given group, matrices first."""
    own = {key: value for key, value in group.items() if key not in ("params", "param_names", "name")}
    divided: dict[tuple[str | None, bool], dict[str, Any]] = {}
    for row in sorted(planned, key=lambda row: row.algorithm != "normuon"):
        decay = row.decay or "weight_decay" in own
        if (row.layout, decay) not in divided:
            divided[row.layout, decay] = {"name": prefix + _kind(row, decay), "algorithm": row.algorithm, "params": []}
            divided[row.layout, decay] |= own if decay else {**own, "weight_decay": 0.0}
            if row.layout is not None:
                divided[row.layout, decay]["layout"] = row.layout
        divided[row.layout, decay]["params"].append((row.name, row.parameter))
    return list(divided.values())


def _kind(row: PlannedParameter, decay: bool) -> str:
    """Return the name of the plan's own group for ``row``, were its decay this one."""
    kind = row.group_name.removesuffix("_no_decay")
    return kind if decay else f"{kind}_no_decay"


def _left_as_it_is(
    group: Mapping[str, Any],
    called: str,
    pairs: Iterable[tuple[str | None, Tensor]],
    rows: Mapping[int, PlannedParameter],
) -> dict[str, Any]:
    """Return a copy of the group in which every parameter has a name: torch wants all groups with names, or none."""
    named = [
        (rows[id(parameter)].name if id(parameter) in rows else name or f"{called}.{index}", parameter)
        for index, (name, parameter) in enumerate(pairs)
    ]
    return {"name": called, **{key: value for key, value in group.items() if key != "param_names"}, "params": named}


def _unique(name: str, taken: Collection[str]) -> str:
    number, found = 1, name
    while found in taken:
        number += 1
        found = f"{name}_{number}"
    return found
