"""What the optimizer remembers of a parameter: one rule for creation and checks; ``loading`` reads it, too."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from normuon_plugins.core.compensation import COMPENSATED_DTYPES, COMPENSATION
from normuon_plugins.core.layout import parse_layout
from normuon_plugins.core.momentum import (
    Momentum,
    Spec,
    convert,
    momentum_dtype,
    momentum_specs,
    stored_momentum,
)
from normuon_plugins.core.step_size import MATCH_PROGRESS, NO_VALUE
from normuon_plugins.distributed.placement import describe, local, whereabouts, zeros

MOMENTUM = frozenset({"momentum_buffer", "momentum_scale"})
MEAN_SQUARE_KEY = "gradient_mean_square"
# Kept under an option that a later version, or a later part of a run, may choose otherwise.
OPTIONAL = frozenset({COMPENSATION, MEAN_SQUARE_KEY})
# Every key that is ours. Others belong to whoever put them there (Lookahead, Grokfast): they stay and are saved.
STATE_KEYS = MOMENTUM | OPTIONAL | {"second_momentum_buffer", "exp_avg", "exp_avg_sq", "step"}


def state_specs(
    parameter: Tensor, group: Mapping[str, Any], *, kahan_sum: bool, stored: torch.dtype | None = None
) -> Mapping[str, Spec]:
    """Return shape and dtype of each state tensor of a parameter, by its key: the one place that says what there is.

    ``momentum_buffer`` (with ``momentum_scale`` where it is int8), ``second_momentum_buffer`` (one value per neuron)
    and under ``match_progress_adamw`` ``gradient_mean_square`` (one per matrix) for NorMuon; ``exp_avg``,
    ``exp_avg_sq`` and ``step`` as in ``torch.optim.AdamW``; ``kahan_compensation`` where rounding of the parameter is
    compensated.

    The neuron state is float32 whatever the parameter's dtype, since a decay of 0.05 per step is below bfloat16's
    resolution, and so is ``step``, which would end at 256.

    Args:
        parameter: Any parameter of the group.
        group: Complete.
        kahan_sum: The option.
        stored: In which momentum is, if not as the group says: ``momentum_dtype`` was changed since.
    """
    dtype = parameter.dtype
    if group["algorithm"] == "adamw":
        return _specs(tuple(parameter.shape), dtype, None, dtype, False, kahan_sum)
    stored = stored or momentum_dtype(group, dtype)
    keeps_mean_square = group["adjust_lr_fn"] == MATCH_PROGRESS
    return _specs(tuple(parameter.shape), dtype, group["layout"], stored, keeps_mean_square, kahan_sum)


@lru_cache(maxsize=4096)  # asked twice per parameter and step, and a model has few shapes
def _specs(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    layout: str | None,
    stored: torch.dtype,
    keeps_mean_square: bool,
    kahan_sum: bool,
) -> Mapping[str, Spec]:
    """Return what ``state_specs`` does; without a layout, AdamW's."""
    specs: dict[str, Spec] = {"step": ((), torch.float32), "exp_avg": (shape, dtype), "exp_avg_sq": (shape, dtype)}
    if layout is not None:
        parsed = parse_layout(layout)
        specs = momentum_specs(shape, parsed, stored)
        specs["second_momentum_buffer"] = (parsed.neuron_state_shape(shape), torch.float32)
        if keeps_mean_square:
            specs[MEAN_SQUARE_KEY] = (parsed.matrix_state_shape(shape), torch.float32)
    if kahan_sum and dtype in COMPENSATED_DTYPES:
        specs[COMPENSATION] = (shape, dtype)
    return MappingProxyType(specs)


def prepare_state(
    members: Sequence[tuple[Tensor, Mapping[str, Any], str]],
    states: MutableMapping[Tensor, dict[str, Tensor]],
    *,
    kahan_sum: bool,
) -> None:
    """Create what is missing of the state of parameters, and store momentum as ``momentum_dtype`` says by now.

    Args:
        members: Parameters with their groups and names.
        states: By parameter. Modified.
        kahan_sum: The option.
    """
    changed = []
    for parameter, group, _ in members:
        state = states.get(parameter, {})
        specs = state_specs(parameter, group, kahan_sum=kahan_sum)
        kept = {
            key: state[key]
            for key in specs.keys() & state.keys()
            if key not in MOMENTUM or state[key].dtype == specs[key][1]
        }
        # What another adjust_lr_fn kept would be out of date should it be chosen again.
        stale = MEAN_SQUARE_KEY in state and MEAN_SQUARE_KEY not in specs
        if len(kept) < len(specs) or stale:
            changed.append((parameter, group, specs, kept))
    for parameter, group, specs, kept in changed:
        old = states.get(parameter, {})
        states[parameter] = {key: old[key] for key in old if key not in STATE_KEYS} | {
            key: kept[key] if key in kept else begin(parameter, key, spec, "momentum_buffer" in old)
            for key, spec in specs.items()
        }
        if "momentum_buffer" in old and "momentum_buffer" not in kept:
            wide = torch.promote_types(parameter.dtype, torch.float32)
            convert(_momentum(old, group), _momentum(states[parameter], group), wide)


def _momentum(state: Mapping[str, Tensor], group: Mapping[str, Any]) -> Momentum:
    blocks = {key: local(state[key]) for key in MOMENTUM & state.keys()}
    return stored_momentum(blocks, parse_layout(group["layout"]))


def begin(parameter: Tensor, key: str, spec: Spec, has_momentum: bool) -> Tensor:
    """Return a state that is not there yet: zeros, or where a full momentum has no mean square beside it, no value."""
    state = zeros_of(parameter, key, spec)
    if key == MEAN_SQUARE_KEY and has_momentum:
        local(state).fill_(NO_VALUE)
    return state


def zeros_of(parameter: Tensor, key: str, spec: Spec) -> Tensor:
    """Return zeros on the parameter's device, placed like it, and replicated where a size became 1."""
    shape, dtype = spec
    if key == "step":
        return torch.zeros(shape, dtype=dtype, device=local(parameter).device)
    if shape == tuple(parameter.shape) and dtype.is_floating_point:
        return torch.zeros_like(parameter, dtype=dtype, memory_format=torch.preserve_format)
    return zeros(parameter, shape, dtype, divided=key != MEAN_SQUARE_KEY)


def route(group: Mapping[str, Any]) -> tuple[str, str | None]:
    """Return the algorithm and the layout of a group's parameters."""
    return group["algorithm"], group.get("layout")


def route_words(group: Mapping[str, Any]) -> str:
    """Return the same in words."""
    algorithm, layout = route(group)
    return algorithm if layout is None else f"{algorithm} with layout {layout!r}"


def stored_dtype(state: Mapping[str, Any]) -> torch.dtype | None:
    """Return in which dtype a state holds momentum; None if it holds none."""
    return state["momentum_buffer"].dtype if isinstance(state.get("momentum_buffer"), Tensor) else None


def check_state(parameter: Tensor, group: Mapping[str, Any], name: str, state: Mapping[str, Tensor]) -> None:
    """Raise ``ValueError`` when ``parameter`` was cast, moved, sharded or routed anew since ``state`` was created.

    Another ``momentum_dtype`` than before is none of these.
    """
    stored = stored_dtype(state) if group.get("momentum_dtype") is not None else None
    specs = state_specs(parameter, group, kahan_sum=False, stored=stored)
    for key, (shape, _) in specs.items():
        if shape == tuple(parameter.shape) and key in state and tuple(state[key].shape) != shape:
            raise ValueError(
                f"{name!r} has shape {shape}, its {key} {tuple(state[key].shape)}: the parameter was resized after the"
                " first step. Build a new optimizer, or resize first."
            )
        if key == MEAN_SQUARE_KEY and key not in state:
            continue  # the group began with another adjust_lr_fn
        if key not in state or tuple(state[key].shape) != shape:
            raise ValueError(
                f"{name!r} is on {route_words(group)}, its state is not: the group was"
                " edited after the first step. Undo that, or start with a new optimizer."
            )
    key = "momentum_buffer" if group["algorithm"] == "normuon" else "exp_avg"
    buffer = state[key]
    if whereabouts(parameter) == whereabouts(buffer) and buffer.dtype == specs[key][1]:
        return
    raise ValueError(
        f"{name!r} is {describe(parameter)} on {parameter.device}, its state {describe(buffer)} on {buffer.device}: the"
        " model was cast, moved or sharded after the first step. Do that before it, or load the state anew."
    )
