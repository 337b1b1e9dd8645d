"""What the optimizer remembers of a parameter: creation, and the checks and precision of loading."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from normuon_plugins.core.compensation import COMPENSATED_DTYPES, COMPENSATION
from normuon_plugins.core.group_options import parameter_name
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


def state_specs(
    parameter: Tensor, group: Mapping[str, Any], *, kahan_sum: bool, stored: torch.dtype | None = None
) -> dict[str, Spec]:
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
    shape, dtype = tuple(parameter.shape), parameter.dtype
    specs: dict[str, Spec]
    if group["algorithm"] == "adamw":
        specs = {"step": ((), torch.float32), "exp_avg": (shape, dtype), "exp_avg_sq": (shape, dtype)}
    else:
        layout = parse_layout(group["layout"])
        specs = momentum_specs(shape, layout, stored or momentum_dtype(group, dtype))
        specs["second_momentum_buffer"] = (layout.neuron_state_shape(shape), torch.float32)
        if group["adjust_lr_fn"] == MATCH_PROGRESS:
            specs[MEAN_SQUARE_KEY] = (layout.matrix_state_shape(shape), torch.float32)
    if kahan_sum and dtype in COMPENSATED_DTYPES:
        specs[COMPENSATION] = (shape, dtype)
    return specs


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
        states[parameter] = {
            key: kept[key] if key in kept else _begin(parameter, key, spec, "momentum_buffer" in old)
            for key, spec in specs.items()
        }
        if "momentum_buffer" in old and "momentum_buffer" not in kept:
            wide = torch.promote_types(parameter.dtype, torch.float32)
            convert(_momentum(old, group), _momentum(states[parameter], group), wide)


def _momentum(state: Mapping[str, Tensor], group: Mapping[str, Any]) -> Momentum:
    blocks = {key: local(state[key]) for key in MOMENTUM & state.keys()}
    return stored_momentum(blocks, parse_layout(group["layout"]))


def _begin(parameter: Tensor, key: str, spec: Spec, has_momentum: bool) -> Tensor:
    """Return a state that is not there yet: zeros, or where a full momentum has no mean square beside it, no value."""
    state = _zeros(parameter, key, spec)
    if key == MEAN_SQUARE_KEY and has_momentum:
        local(state).fill_(NO_VALUE)
    return state


def _zeros(parameter: Tensor, key: str, spec: Spec) -> Tensor:
    """Return zeros on the parameter's device, placed like it, and replicated where a size became 1."""
    shape, dtype = spec
    if key == "step":
        return torch.zeros(shape, dtype=dtype, device=local(parameter).device)
    if shape == tuple(parameter.shape) and dtype.is_floating_point:
        return torch.zeros_like(parameter, dtype=dtype, memory_format=torch.preserve_format)
    return zeros(parameter, shape, dtype, divided=key != MEAN_SQUARE_KEY)


def check_loadable(param_groups: Sequence[Mapping[str, Any]], state_dict: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` unless a NorMuon with these parameters on these algorithms wrote ``state_dict``.

    torch matches parameters by their place in the groups. Under another plan the places differ, and a parameter would
    silently get another one's state, so names, algorithms and layouts are compared first where both sides have them.
    """
    saved_groups = state_dict["param_groups"]
    if any("algorithm" not in group for group in saved_groups):
        raise ValueError(
            "The checkpoint's groups have no 'algorithm': another optimizer wrote it. Resume with that one, or start"
            " NorMuon without its state."
        )
    here, saved = _routes(param_groups), _routes(saved_groups)
    by_name = dict(saved)
    named = all("param_names" in group for group in [*param_groups, *saved_groups])
    names_agree = named and by_name.keys() == dict(here).keys()
    for (name, route), (_, saved_route) in zip(here, saved, strict=False):
        found = by_name[name] if names_agree else saved_route
        if found != route:
            raise ValueError(
                f"{name!r} is on {_words(route)} here and on {_words(found)} in the checkpoint."
                " Load with the plan (overrides) that the checkpoint was written with."
            )
    if names_agree and here != saved:
        raise ValueError("The checkpoint holds the same parameters in another order; build the groups as it did.")
    for group, saved_group in zip(param_groups, saved_groups, strict=False):
        for index, (parameter, saved_id) in enumerate(zip(group["params"], saved_group["params"], strict=False)):
            state = state_dict["state"].get(saved_id)
            if state:
                _check_saved_state(parameter, parameter_name(group, index), group, saved_group, state)


def _routes(param_groups: Sequence[Mapping[str, Any]]) -> list[tuple[str, tuple[str, str | None]]]:
    """Return the name, algorithm and layout of every parameter, in order."""
    return [
        (parameter_name(group, index), (group["algorithm"], group.get("layout")))
        for group in param_groups
        for index in range(len(group["params"]))
    ]


def _words(route: tuple[str, str | None]) -> str:
    algorithm, layout = route
    return algorithm if layout is None else f"{algorithm} with layout {layout!r}"


def _check_saved_state(
    parameter: Tensor,
    name: str,
    group: Mapping[str, Any],
    saved_group: Mapping[str, Any],
    saved: Mapping[str, Tensor],
) -> None:
    """Raise ``ValueError`` when ``saved`` has other keys or shapes than the state of ``parameter``.

    What rounding lost and the mean square of the gradient may be missing or in excess: they begin anew, or are left
    out.
    """
    is_int8 = "momentum_scale" in saved
    if "momentum_dtype" in saved_group and (saved_group["momentum_dtype"] == "int8") != is_int8:
        raise ValueError(
            f"{name!r}: the checkpoint was written with momentum_dtype={saved_group['momentum_dtype']!r} and read"
            f" {'into int8' if is_int8 else 'without the scales'}. Build the optimizer with the checkpoint's"
            " momentum_dtype, load, then write another one into its param_groups."
        )
    expected = state_specs(parameter, group, kahan_sum=COMPENSATION in saved, stored=_stored_dtype(saved))
    if saved.keys() - OPTIONAL != expected.keys() - OPTIONAL:
        raise ValueError(
            f"{name!r} is on {group['algorithm']!r} here; its checkpoint holds {sorted(saved)}."
            " Load with the plan (overrides) that the checkpoint was written with."
        )
    for key, (shape, _) in expected.items():
        if key in saved and tuple(saved[key].shape) != shape:
            raise ValueError(
                f"{name!r}: {key} has shape {tuple(saved[key].shape)} in the checkpoint and needs {shape} here."
            )


def _stored_dtype(state: Mapping[str, Tensor]) -> torch.dtype | None:
    """Return in which dtype a state holds momentum; None if it holds none."""
    return state["momentum_buffer"].dtype if "momentum_buffer" in state else None


def check_state(parameter: Tensor, group: Mapping[str, Any], name: str, state: Mapping[str, Tensor]) -> None:
    """Raise ``ValueError`` when ``parameter`` was cast, moved, sharded or routed anew since ``state`` was created.

    Another ``momentum_dtype`` than before is none of these.
    """
    stored = _stored_dtype(state) if group.get("momentum_dtype") is not None else None
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
                f"{name!r} is on {_words((group['algorithm'], group.get('layout')))}, its state is not: the group was"
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


def place_state(
    states: MutableMapping[Tensor, dict[str, Tensor]],
    param_groups: Sequence[Mapping[str, Any]],
    state_dict: Mapping[str, Any],
    *,
    kahan_sum: bool,
) -> None:
    """Put what a checkpoint holds where the parameters are, in the dtypes of ``state_specs``.

    torch would cast all but ``step`` to the parameter's dtype, and leave that on the device it was saved from
    (``_process_value_according_to_param_policy`` in torch/optim/optimizer.py).
    """
    for group, saved_group in zip(param_groups, state_dict["param_groups"], strict=True):
        for parameter, saved_id in zip(group["params"], saved_group["params"], strict=True):
            saved = state_dict["state"].get(saved_id)
            if saved:
                states[parameter] = _placed(parameter, group, saved, kahan_sum)


def _placed(
    parameter: Tensor, group: Mapping[str, Any], saved: Mapping[str, Tensor], kahan_sum: bool
) -> dict[str, Tensor]:
    stored = _stored_dtype(saved)
    is_int8 = stored == torch.int8
    if stored is not None and is_int8 == (momentum_dtype(group, parameter.dtype) == torch.int8):
        stored = None  # else the next step stores it as the group says
    state = {}
    for key, spec in state_specs(parameter, group, kahan_sum=kahan_sum, stored=stored).items():
        if key not in saved:
            state[key] = _begin(parameter, key, spec, "momentum_buffer" in saved)
            continue
        state[key] = saved[key].to(device=parameter.device, dtype=spec[1])
        if not local(state[key]).is_contiguous() and key in MOMENTUM and is_int8:
            strided = state[key]
            state[key] = _zeros(parameter, key, spec)
            local(state[key]).copy_(local(strided))
    return state
