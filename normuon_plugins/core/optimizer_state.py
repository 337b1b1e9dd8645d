"""What the optimizer remembers of a parameter: creation, and the checks and precision of loading."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from normuon_plugins.core.group_options import parameter_name
from normuon_plugins.core.layout import parse_layout
from normuon_plugins.distributed.placement import describe, is_like, local, zeros

# float32 whatever the parameter's dtype: a decay of 0.05 per step is below bfloat16's resolution, and counting steps
# ends at 256.
FLOAT32_STATE = frozenset({"second_momentum_buffer", "step"})
LIKE_PARAMETER = frozenset({"momentum_buffer", "exp_avg", "exp_avg_sq"})


def state_shapes(parameter: Tensor, group: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each state tensor of a parameter, by its key.

    ``momentum_buffer`` and ``second_momentum_buffer`` (one value per neuron) for NorMuon; ``exp_avg``,
    ``exp_avg_sq`` and ``step`` as in ``torch.optim.AdamW``.
    """
    shape = tuple(parameter.shape)
    if group["algorithm"] == "adamw":
        return {"step": (), "exp_avg": shape, "exp_avg_sq": shape}
    return {
        "momentum_buffer": shape,
        "second_momentum_buffer": parse_layout(group["layout"]).neuron_state_shape(shape),
    }


def create_state(parameter: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return zeros for every key of ``state_shapes``, on the parameter's device.

    A sharded parameter gets DTensors placed like it; the second moment is replicated where inputs are sharded.
    """
    state = {}
    for key, shape in state_shapes(parameter, group).items():
        if key == "step":
            state[key] = torch.zeros(shape, dtype=torch.float32, device=local(parameter).device)
        elif key in FLOAT32_STATE:
            state[key] = zeros(parameter, shape, torch.float32)
        else:
            state[key] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return state


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
                _check_saved_state(parameter, parameter_name(group, index), group, state)


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


def _check_saved_state(parameter: Tensor, name: str, group: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` when ``saved`` has other keys or shapes than the state of ``parameter``."""
    expected = state_shapes(parameter, group)
    if saved.keys() != expected.keys():
        raise ValueError(
            f"{name!r} is on {group['algorithm']!r} here; its checkpoint holds {sorted(saved)}."
            " Load with the plan (overrides) that the checkpoint was written with."
        )
    for key, shape in expected.items():
        if tuple(saved[key].shape) != shape:
            raise ValueError(
                f"{name!r}: {key} has shape {tuple(saved[key].shape)} in the checkpoint and needs {shape} here."
            )


def check_state(parameter: Tensor, group: Mapping[str, Any], name: str, state: Mapping[str, Tensor]) -> None:
    """Raise ``ValueError`` when ``parameter`` was cast, moved, sharded or routed anew since ``state`` was created."""
    for key, shape in state_shapes(parameter, group).items():
        if key in LIKE_PARAMETER and key in state and tuple(state[key].shape) != shape:
            raise ValueError(
                f"{name!r} has shape {shape}, its {key} {tuple(state[key].shape)}: the parameter was resized after the"
                " first step. Build a new optimizer, or resize first."
            )
        if key not in state or tuple(state[key].shape) != shape:
            raise ValueError(
                f"{name!r} is on {_words((group['algorithm'], group.get('layout')))}, its state is not: the group was"
                " edited after the first step. Undo that, or start with a new optimizer."
            )
    buffer = state["momentum_buffer" if group["algorithm"] == "normuon" else "exp_avg"]
    if is_like(parameter, buffer):
        return
    raise ValueError(
        f"{name!r} is {describe(parameter)} on {parameter.device}, its state {describe(buffer)} on {buffer.device}: the"
        " model was cast, moved or sharded after the first step. Do that before it, or load the state anew."
    )


def restore_float32(
    state: Mapping[Tensor, dict[str, Any]], param_groups: Sequence[Mapping[str, Any]], state_dict: Mapping[str, Any]
) -> None:
    """Put back what ``Optimizer.load_state_dict`` cast to the parameter's dtype, on the parameter's device.

    torch exempts only ``step``, and leaves that on the device it was saved from
    (``_process_value_according_to_param_policy`` in torch/optim/optimizer.py).
    """
    parameters = chain.from_iterable(group["params"] for group in param_groups)
    saved_ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    for parameter, saved_id in zip(parameters, saved_ids, strict=True):
        saved = state_dict["state"].get(saved_id, {})
        for key in FLOAT32_STATE & saved.keys():
            state[parameter][key] = saved[key].to(device=parameter.device, dtype=torch.float32)
