"""Which parameter gets which algorithm and layout, and why: an auditable table, and the groups it stands for."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from normuon_plugins.core.decision import Decision
from normuon_plugins.core.group_options import DEFAULT_LAYOUT
from normuon_plugins.core.layout import parse_layout
from normuon_plugins.core.model_facts import ModelFacts
from normuon_plugins.core.names import has_match
from normuon_plugins.core.parameter_rules import PlanOptions, decide
from normuon_plugins.core.plan_checks import (
    ask_for_matrices,
    check_plan_options,
    obstacle,
    refuse_hidden_shapes,
    refuse_unrecognised,
)
from normuon_plugins.core.plan_table import PlannedParameter, format_plan
from normuon_plugins.distributed.replicas import reshard


class ParameterPlan:
    """The rows of a plan in ``named_parameters()`` order; ``print`` it before a long run."""

    def __init__(self, rows: list[PlannedParameter]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[PlannedParameter]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> PlannedParameter:
        """Return the row of the parameter called ``name``.

        Raises:
            KeyError: If the plan has no such parameter.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)

    def __str__(self) -> str:
        return format_plan(self.rows)

    def param_groups(
        self, *, weight_decay: float | None = None, adamw_weight_decay: float | None = None
    ) -> list[dict[str, Any]]:
        """Return the groups for ``NorMuon``: the matrices by layout first, then AdamW with decay and without.

        Args:
            weight_decay: Of the matrices; None leaves it to ``NorMuon``'s own argument.
            adamw_weight_decay: Of embeddings, heads and other AdamW parameters that decay; None likewise.

        Returns:
            Dicts of ``name``, ``algorithm``, ``layout`` and ``(name, parameter)`` pairs; every row in exactly one,
            none empty.
        """
        groups: dict[str, dict[str, Any]] = {}
        for row in sorted(self.rows, key=lambda row: row.algorithm != "normuon"):
            group = groups.setdefault(
                row.group_name, {"name": row.group_name, "algorithm": row.algorithm, "params": []}
            )
            group["params"].append((row.name, row.parameter))
            decay = weight_decay if row.layout is not None else adamw_weight_decay
            if row.layout is not None:
                group["layout"] = row.layout
            if not row.decay:
                group["weight_decay"] = 0.0
            elif decay is not None:
                group["weight_decay"] = decay
        return list(groups.values())

    def to_dict(self) -> list[dict[str, Any]]:
        """Return the rows as dicts of JSON types."""
        keys = ("name", "shape", "algorithm", "layout", "decay", "reason")
        return [{key: list(row.shape) if key == "shape" else getattr(row, key) for key in keys} for row in self.rows]


def plan_parameters(
    model: nn.Module,
    *,
    overrides: Mapping[str, str] | None = None,
    lora: str = "adamw",
    split_fused: bool = True,
    per_head: bool = False,
    strict: bool = False,
    include_frozen: bool = False,
    allow_no_matrix: bool = False,
) -> ParameterPlan:
    """Decide for every trainable parameter of ``model`` between NorMuon and AdamW.

    Args:
        model: Any module. Frozen parameters are left out, unless ``include_frozen``; tied weights are planned once.
        overrides: Regular expression, searched in the FQN (any of them for a tied weight) -> ``"normuon"``,
            ``"adamw"`` or a layout string such as ``"e o i"``. ``"normuon"`` keeps the layout that the rules found,
            or takes ``"o i"`` for a 2-D parameter.
        lora: Where LoRA factors go: ``"adamw"``, ``"normuon"``, or ``"b"`` for NorMuon on the B factors only.
        split_fused: Whether each projection in a fused weight gets the update that it would get as a parameter of its
            own; False takes the whole weight as one matrix.
        per_head: Whether the heads of query, key and value projections are orthogonalized one by one.
        strict: Whether to raise if a trainable parameter fell to the default rule, or if all of them are AdamW's.
        include_frozen: Whether frozen parameters are planned as well, as if they were trainable, for a run that thaws
            them later. Those that no optimizer could train (quantized ones, integers) are left out. Refusals and
            warnings are about trainable parameters all the same.
        allow_no_matrix: Whether it is meant that nothing is on NorMuon: no warning then, nor an error under
            ``strict``.

    Returns:
        The plan.

    Raises:
        TypeError: If ``model`` is no module, or ``overrides`` no mapping.
        ValueError: If an override matches nothing, contradicts another or does not fit its parameter, if a parameter
            cannot be trained at all, if there is nothing to train, if another framework hides the shapes (FSDP1,
            ZeRO-3), or under ``strict``; the message names the parameters and says what was seen.

    Warns:
        UserWarning: If every trainable parameter went to AdamW.

    Example:
        >>> plan = plan_parameters(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
        >>> [(row.name, row.algorithm) for row in plan]
        [('0.weight', 'normuon'), ('0.bias', 'adamw'), ('2.weight', 'normuon'), ('2.bias', 'adamw')]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"the plan needs the model itself, an nn.Module; got {type(model).__name__}.")
    switches = {"split_fused": split_fused, "per_head": per_head, "strict": strict}
    check_plan_options(lora, **switches, include_frozen=include_frozen, allow_no_matrix=allow_no_matrix)
    refuse_hidden_shapes(model)
    reshard(model)
    facts = ModelFacts(model)
    options = PlanOptions(lora, split_fused, per_head)
    parameters = _planned_parameters(model, include_frozen)
    chosen = _match_overrides({} if overrides is None else overrides, parameters, facts)
    rows = []
    for name, parameter in parameters.items():
        decision = decide(parameter, facts, options)
        if name in chosen:
            decision = _apply_override(name, parameter, chosen[name], decision)
        algorithm = "adamw" if decision.layout is None else "normuon"
        shape = tuple(parameter.shape)
        rows.append(
            PlannedParameter(name, shape, algorithm, decision.layout, decision.decay, decision.reason, parameter)
        )
    trainable = [row for row in rows if row.parameter.requires_grad]
    if strict:
        refuse_unrecognised(trainable)
    ask_for_matrices(model, trainable, facts, lora, strict=strict, allowed=allow_no_matrix)
    return ParameterPlan(rows)


def _planned_parameters(model: nn.Module, include_frozen: bool) -> dict[str, Tensor]:
    """Return the parameters that a plan is about, by name; raise ``ValueError`` for one that cannot be trained."""
    planned: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        found = obstacle(parameter)
        if parameter.requires_grad and found is not None:
            raise ValueError(f"{name!r} {found}.")
        if parameter.requires_grad or (include_frozen and found is None):
            planned[name] = parameter
    return planned


def _match_overrides(
    overrides: Mapping[str, str], parameters: Mapping[str, Tensor], facts: ModelFacts
) -> dict[str, str]:
    """Return the override of each parameter that one matches."""
    if not isinstance(overrides, Mapping):
        raise TypeError(f"overrides must map patterns to 'normuon', 'adamw' or a layout; got {overrides!r}.")
    chosen: dict[str, str] = {}
    pattern_of: dict[str, str] = {}
    for pattern, target in overrides.items():
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"override {pattern!r} is no regular expression: {error}.") from None
        matched = [
            name
            for name, parameter in parameters.items()
            if any(has_match(pattern, place) for place in (name, *(owner.name for owner in facts.owners[parameter])))
        ]
        if not matched:
            raise ValueError(
                f"override {pattern!r} matches no trainable parameter; the names begin {list(parameters)[:3]}."
            )
        for name in matched:
            if name in chosen:
                raise ValueError(
                    f"overrides {pattern_of[name]!r} and {pattern!r} both match {name!r}; narrow one of them."
                )
            chosen[name], pattern_of[name] = target, pattern
    return chosen


def _apply_override(name: str, parameter: Tensor, target: str, decision: Decision) -> Decision:
    """Return the decision that ``target`` asks for; see ``plan_parameters``."""
    if target == "adamw":
        return Decision(None, "override", decision.decay)
    if parameter.is_complex():
        raise ValueError(f"override of {name!r} to {target!r}: {parameter.dtype} parameters are AdamW's. Use 'adamw'.")
    if target == "normuon":
        target = decision.layout or DEFAULT_LAYOUT
    try:
        parse_layout(target).check(parameter.shape)
    except ValueError as error:
        raise ValueError(
            f"override of {name!r} to {target!r}: {error}. Use 'normuon', 'adamw' or a layout that fits."
        ) from None
    return Decision(target, "override")
