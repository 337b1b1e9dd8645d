"""What a checkpoint holds of each parameter: checked, and put where the parameter lies."""

from __future__ import annotations

import copy
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from normuon_plugins.core.compensation import COMPENSATION
from normuon_plugins.core.group_options import parameter_name
from normuon_plugins.core.matching import check_route
from normuon_plugins.core.momentum import momentum_dtype
from normuon_plugins.core.optimizer_state import (
    MOMENTUM,
    OPTIONAL,
    STATE_KEYS,
    begin,
    state_specs,
    stored_dtype,
    zeros_of,
)
from normuon_plugins.distributed.placement import local

Group = Mapping[str, Any]


def check_loadable(param_groups: Sequence[Group], saved_groups: Sequence[Group], states: Mapping[Any, Any]) -> None:
    """Raise ``ValueError`` unless a NorMuon with these parameters on these algorithms wrote the checkpoint.

    Args:
        param_groups: Of this optimizer.
        saved_groups: Those of the checkpoint in this order, see ``match_groups``.
        states: Of the checkpoint, by number.
    """
    for group, saved_group in zip(param_groups, saved_groups, strict=False):
        for index, (parameter, saved_id) in enumerate(zip(group["params"], saved_group["params"], strict=False)):
            if saved_id is None:
                continue
            name = parameter_name(group, index)
            check_route(name, group, saved_group)
            if states.get(saved_id):
                _check_saved_state(parameter, name, group, saved_group, states[saved_id])


def _check_saved_state(
    parameter: Tensor, name: str, group: Group, saved_group: Group, saved: Mapping[str, Any]
) -> None:
    """Raise ``ValueError`` when ``saved`` has other keys or shapes than the state of ``parameter``.

    What rounding lost and the mean square of the gradient may be missing or in excess: they begin anew, or are left
    out. Keys of others (a wrapper that keeps its own numbers here) travel along.
    """
    is_int8 = "momentum_scale" in saved
    if "momentum_dtype" in saved_group and (saved_group["momentum_dtype"] == "int8") != is_int8:
        raise ValueError(
            f"{name!r}: the checkpoint was written with momentum_dtype={saved_group['momentum_dtype']!r} and read"
            f" {'into int8' if is_int8 else 'without the scales'}. Build the optimizer with the checkpoint's"
            " momentum_dtype, load, then write another one into its param_groups."
        )
    expected = state_specs(parameter, group, kahan_sum=COMPENSATION in saved, stored=stored_dtype(saved))
    if (saved.keys() & STATE_KEYS) - OPTIONAL != expected.keys() - OPTIONAL:
        raise ValueError(
            f"{name!r} is on {group['algorithm']!r} here; its checkpoint holds {sorted(saved)}."
            " Load with the plan (overrides) that the checkpoint was written with."
        )
    for key, (shape, _) in expected.items():
        if key not in saved:
            continue
        if not isinstance(saved[key], Tensor) and key != "step":
            raise ValueError(f"{name!r}: {key} is no tensor in the checkpoint but {type(saved[key]).__name__}.")
        found = tuple(torch.as_tensor(saved[key]).shape)
        if found != shape:
            raise ValueError(f"{name!r}: {key} has shape {found} in the checkpoint and needs {shape} here.")


def place_state(
    before: Mapping[Tensor, Mapping[str, Any]],
    states: MutableMapping[Tensor, dict[str, Any]],
    param_groups: Sequence[Group],
    state_dict: Mapping[str, Any],
    *,
    kahan_sum: bool,
) -> None:
    """Put what a checkpoint holds where the parameters are, in the dtypes of ``state_specs``.

    torch would cast all but ``step`` to the parameter's dtype, and leave that on the device it was saved from
    (``_process_value_according_to_param_policy`` in torch/optim/optimizer.py). Tensors are copied: a step writes to its
    state, and torch would write to the checkpoint, or to the optimizer that it came from.

    Args:
        before: The state until now.
        states: By parameter, empty. Modified.
        param_groups: Of this optimizer.
        state_dict: The checkpoint, with groups as ``match_groups`` returns them.
        kahan_sum: The option.
    """
    for group, saved_group in zip(param_groups, state_dict["param_groups"], strict=True):
        for parameter, saved_id in zip(group["params"], saved_group["params"], strict=True):
            saved = None if saved_id is None else state_dict["state"].get(saved_id)
            if saved:
                states[parameter] = _placed(parameter, group, saved, before.get(parameter, {}), kahan_sum)


def _placed(
    parameter: Tensor, group: Group, saved: Mapping[str, Any], own: Mapping[str, Any], kahan_sum: bool
) -> dict[str, Any]:
    stored = stored_dtype(saved)
    is_int8 = stored == torch.int8
    if stored is not None and is_int8 == (momentum_dtype(group, parameter.dtype) == torch.int8):
        stored = None  # else the next step stores it as the group says
    state = {}
    for key, spec in state_specs(parameter, group, kahan_sum=kahan_sum, stored=stored).items():
        if key not in saved:
            state[key] = begin(parameter, key, spec, "momentum_buffer" in saved)
            continue
        state[key] = _copied(saved[key], own.get(key), parameter.device, spec[1])
        if not local(state[key]).is_contiguous() and key in MOMENTUM and is_int8:
            strided = state[key]
            state[key] = zeros_of(parameter, key, spec)
            local(state[key]).copy_(local(strided))
    foreign = saved.keys() - STATE_KEYS
    return state | {key: copy.deepcopy(saved[key]) for key in saved if key in foreign}


def _copied(value: Any, own: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return a tensor of a checkpoint as a new one; what this optimizer holds itself, loaded in place, stays."""
    tensor = torch.as_tensor(value)
    return tensor.to(device=device, dtype=dtype, copy=value is not own)
