"""Which parameter gets which algorithm and layout, and why: an auditable table, and the groups it stands for."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from normuon_plugins.core.adapter_rules import LORA_POLICIES, adapter_decision
from normuon_plugins.core.decision import Decision
from normuon_plugins.core.group_options import DEFAULT_LAYOUT, TRAINABLE_DTYPES, is_flat_shard
from normuon_plugins.core.layout import parse_layout
from normuon_plugins.core.model_facts import ModelFacts
from normuon_plugins.core.parameter_rules import NOT_RECOGNISED, PlanOptions, decide
from normuon_plugins.core.plan_table import PlannedParameter, fold_rows, format_plan
from normuon_plugins.core.quantized import is_quantized


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
            KeyError: If the plan has no such trainable parameter.
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
) -> ParameterPlan:
    """Decide for every trainable parameter of ``model`` between NorMuon and AdamW.

    Args:
        model: Any module. Frozen parameters are left out; tied weights are planned once.
        overrides: Regular expression, searched in the FQN (any of them for a tied weight) -> ``"normuon"``,
            ``"adamw"`` or a layout string such as ``"e o i"``. ``"normuon"`` keeps the layout that the rules found,
            or takes ``"o i"`` for a 2-D parameter.
        lora: Where LoRA factors go: ``"adamw"``, ``"normuon"``, or ``"b"`` for NorMuon on the B factors only.
        split_fused: Whether each projection in a fused weight gets the update that it would get as a parameter of its
            own; False takes the whole weight as one matrix.
        per_head: Whether the heads of query, key and value projections are orthogonalized one by one.
        strict: Whether to raise if a parameter fell to the default rule.

    Returns:
        The plan.

    Raises:
        TypeError: If ``model`` is no module, or ``overrides`` no mapping.
        ValueError: If an override matches nothing, contradicts another or does not fit its parameter, if a parameter
            cannot be trained at all, if no matrix is left for NorMuon, if another framework hides the shapes (FSDP1,
            ZeRO-3), or under ``strict``; the message names the parameters and says what was seen.

    Example:
        >>> plan = plan_parameters(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
        >>> [(row.name, row.algorithm) for row in plan]
        [('0.weight', 'normuon'), ('0.bias', 'adamw'), ('2.weight', 'normuon'), ('2.bias', 'adamw')]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"the plan needs the model itself, an nn.Module; got {type(model).__name__}.")
    _check_options(lora, split_fused=split_fused, per_head=per_head, strict=strict)
    _refuse_hidden_shapes(model)
    facts = ModelFacts(model)
    options = PlanOptions(lora, split_fused, per_head)
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    chosen = _match_overrides({} if overrides is None else overrides, trainable, facts)
    rows = []
    for name, parameter in trainable.items():
        if is_quantized(parameter):
            raise ValueError(
                f"{name!r} requires a gradient but is quantized ({type(parameter).__name__}, {parameter.dtype}); freeze"
                " it and train an adapter on it, or load the model without quantization."
            )
        if parameter.dtype not in TRAINABLE_DTYPES:
            raise ValueError(f"{name!r} requires a gradient but is {parameter.dtype}; freeze it or cast the model.")
        decision = decide(parameter, facts, options)
        if name in chosen:
            decision = _apply_override(name, parameter, chosen[name], decision)
        algorithm = "adamw" if decision.layout is None else "normuon"
        shape = tuple(parameter.shape)
        rows.append(
            PlannedParameter(name, shape, algorithm, decision.layout, decision.decay, decision.reason, parameter)
        )
    _refuse_empty(model, rows, facts, lora)
    if strict:
        _refuse_unrecognised(rows)
    return ParameterPlan(rows)


def _match_overrides(
    overrides: Mapping[str, str], trainable: Mapping[str, Tensor], facts: ModelFacts
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
            for name, parameter in trainable.items()
            if any(re.search(pattern, owner.name) for owner in facts.owners[parameter])
        ]
        if not matched:
            raise ValueError(
                f"override {pattern!r} matches no trainable parameter; the names begin {list(trainable)[:3]}."
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
    if target == "normuon":
        target = decision.layout or DEFAULT_LAYOUT
    try:
        parse_layout(target).check(parameter.shape)
    except ValueError as error:
        raise ValueError(
            f"override of {name!r} to {target!r}: {error}. Use 'normuon', 'adamw' or a layout that fits."
        ) from None
    return Decision(target, "override")


def _check_options(lora: str, **switches: bool) -> None:
    """Raise ``ValueError`` for an option that cannot be, or two that contradict each other."""
    if lora not in LORA_POLICIES:
        raise ValueError(f"lora={lora!r} must be one of {LORA_POLICIES}.")
    for name, value in switches.items():
        if not isinstance(value, bool):  # any other word would count as True
            raise ValueError(f"{name}={value!r} must be True or False.")
    if switches["per_head"] and not switches["split_fused"]:
        raise ValueError(
            "per_head=True divides fused weights into heads, split_fused=False keeps them whole; choose one."
        )


def _refuse_hidden_shapes(model: nn.Module) -> None:
    """Raise ``ValueError`` when another framework keeps flat pieces in place of matrices anywhere."""
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_shape"):
            seen = "a placeholder of DeepSpeed ZeRO-3"
        elif is_flat_shard(parameter):
            seen = "a flat 1-D shard of FSDP1"
        else:
            continue
        raise ValueError(
            f"There is no matrix for NorMuon: {name!r} is {seen}; use FSDP2 (fully_shard), which keeps the shapes."
        )


def _refuse_unrecognised(rows: list[PlannedParameter]) -> None:
    """Raise ``ValueError`` when a parameter fell to the default rule."""
    unknown = [row for row in rows if row.reason.startswith(NOT_RECOGNISED)]
    if unknown:
        listed = "\n".join(
            f"  {name}: adamw, {reason}" for name, reason in fold_rows((row.name, row.reason) for row in unknown)
        )
        raise ValueError(
            f"strict=True: no rule recognised {len(unknown)} parameters:\n{listed}\n"
            "Say what they are with overrides={pattern: 'adamw', 'normuon' or a layout}."
        )


def _refuse_empty(model: nn.Module, rows: list[PlannedParameter], facts: ModelFacts, lora: str) -> None:
    """Raise ``ValueError`` when no row is a matrix parameter, saying what was seen instead.

    Adapters alone are on AdamW because ``lora`` says so: that is a warning.
    """
    if any(row.algorithm == "normuon" for row in rows):
        return
    adapted = [
        any(adapter_decision(owner, row.parameter, lora) for owner in facts.owners[row.parameter]) for row in rows
    ]
    if lora == "adamw" and any(adapted):
        warnings.warn(
            "every trainable matrix belongs to an adapter, and lora='adamw' sends those to AdamW: nothing is on"
            " NorMuon. lora='normuon' or lora='b' (the Trainer: optim_args='lora=b') puts low-rank factors on it.",
            stacklevel=3,
        )
        return
    every = list(model.parameters())
    if not every:
        seen = "the model has no parameters"
    elif not rows:
        seen = f"all {len(every)} parameters are frozen"
    else:
        reasons = sorted({row.reason for row in rows})
        seen = f"all {len(rows)} trainable parameters went to AdamW ({'; '.join(reasons)}); use overrides"
    raise ValueError(f"There is no matrix for NorMuon: {seen}.")
