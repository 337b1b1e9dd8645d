"""What a parameter group says: the keys of each algorithm, where their values come from, and which are refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.parameter import is_lazy

from normuon_plugins.core.layout import parse_layout
from normuon_plugins.core.momentum import MOMENTUM_DTYPES
from normuon_plugins.core.orthogonalize import PRESETS
from normuon_plugins.core.quantized import is_quantized
from normuon_plugins.core.step_size import ADJUST_LR_FNS

DEFAULT_LAYOUT = "o i"
COMPLEX_DTYPES = (torch.complex64, torch.complex128)  # on AdamW only
TRAINABLE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, *COMPLEX_DTYPES)
# float16 is missing on purpose: its range ends at 65504 and 6e-8, and momentum has no loss scale.
NS_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}

# Group key -> the option of NorMuon.__init__ whose value it takes when the group does not say.
GROUP_KEYS = {
    "normuon": {
        "lr": "lr",
        "weight_decay": "weight_decay",
        "momentum": "momentum",
        "nesterov": "nesterov",
        "ns_coefficients": "ns_coefficients",
        "eps": "eps",
        "ns_steps": "ns_steps",
        "adjust_lr_fn": "adjust_lr_fn",
        "beta2": "beta2",
        "normalize_neurons": "normalize_neurons",
        "ns_dtype": "ns_dtype",
        "momentum_dtype": "momentum_dtype",
    },
    "adamw": {
        "lr": "adamw_lr",
        "betas": "adamw_betas",
        "eps": "adamw_eps",
        "weight_decay": "adamw_weight_decay",
    },
}


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_size(value: Any) -> bool:
    return _is_number(value) and float(value) >= 0


def _is_decay(value: Any) -> bool:
    return _is_size(value) and float(value) < 1


def _is_rate(value: Any) -> bool:
    # The value of a tensor is not looked at: that would stop a GPU at every step.
    return value.numel() == 1 if isinstance(value, Tensor) else _is_size(value)


def _are_numbers(value: Any, count: int, is_right: Callable[[Any], bool]) -> bool:
    return isinstance(value, Sequence) and len(value) == count and all(map(is_right, value))


# Group key or option -> what its value must be, as a test and in words.
CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "lr": (_is_rate, "a number, at least 0, or a one-element tensor"),
    "weight_decay": (_is_size, "a number, at least 0"),
    "momentum": (_is_decay, "a number in [0, 1)"),
    "nesterov": (lambda value: isinstance(value, bool), "True or False"),
    "ns_coefficients": (
        lambda value: value in PRESETS if isinstance(value, str) else _are_numbers(value, 3, _is_number),
        f"one of {sorted(PRESETS)} or three numbers (a, b, c)",
    ),
    "eps": (_is_size, "a number, at least 0"),
    "ns_steps": (
        lambda value: isinstance(value, Integral) and not isinstance(value, bool) and 1 <= int(value) < 100,
        "a whole number from 1 to 99",
    ),
    "adjust_lr_fn": (lambda value: value in ADJUST_LR_FNS, f"one of {ADJUST_LR_FNS}"),
    "beta2": (_is_decay, "a number in [0, 1)"),
    "normalize_neurons": (lambda value: isinstance(value, bool), "True or False"),
    "betas": (lambda value: _are_numbers(value, 2, _is_decay), "two numbers in [0, 1)"),
    "ns_dtype": (
        lambda value: value is None or str(value).removeprefix("torch.") in NS_DTYPES,
        f"one of {tuple(NS_DTYPES)}, or None to choose by device",
    ),
    "momentum_dtype": (
        lambda value: value is None or str(value).removeprefix("torch.") in MOMENTUM_DTYPES,
        f"one of {tuple(MOMENTUM_DTYPES)}, or None for the parameter's own",
    ),
    "compile": (lambda value: isinstance(value, bool), "True or False"),
    "kahan_sum": (lambda value: isinstance(value, bool), "True or False"),
    "nonfinite": (lambda value: value in ("propagate", "skip", "raise"), "'propagate', 'skip' or 'raise'"),
    "bucket_bytes": (
        lambda value: isinstance(value, Integral) and int(value) >= 1,
        "a whole number of bytes, at least 1",
    ),
    "replicas": (lambda value: value in ("share", "redundant"), "'share' or 'redundant'"),
    "process_group": (
        lambda value: value is None or isinstance(value, ProcessGroup),
        "a torch.distributed.ProcessGroup, or None",
    ),
    "orthogonalize_fn": (
        lambda value: value is None or callable(value),
        "a function of a tensor (batch, rows, cols), or None",
    ),
}


def check_option(name: str, value: Any) -> None:
    """Raise ``ValueError`` when ``value`` is not what the group key or option ``name`` must be."""
    is_right, expected = CHECKS[name.removeprefix("adamw_")]
    if not is_right(value):
        raise ValueError(f"{name}={value!r} must be {expected}.")


def check_group(group: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` unless a complete group is one that a step can take; reads no tensor."""
    algorithm = group.get("algorithm")
    if algorithm not in GROUP_KEYS:
        raise ValueError(f"algorithm={algorithm!r} is not known{_in_group(group)}; use one of {tuple(GROUP_KEYS)}.")
    needed = [*GROUP_KEYS[algorithm], *(["layout"] if algorithm == "normuon" else [])]
    if missing := [key for key in needed if key not in group]:
        raise ValueError(
            f"a group of algorithm={algorithm!r} needs {missing}, which it lost{_in_group(group)}."
            " Put them back, or build the groups anew: plan_parameters(model).param_groups()."
        )
    for key in GROUP_KEYS[algorithm]:
        check_option(key, group[key])
    if algorithm == "normuon":
        parse_layout(group["layout"])
    elif "layout" in group:
        raise ValueError(f"layout={group['layout']!r} belongs to algorithm='normuon'; this group says 'adamw'.")


def _in_group(group: Mapping[str, Any]) -> str:
    """Return where a group stands, for a message: its name and first parameter, as far as it has them."""
    names = [str(group["name"])] if "name" in group else []
    names += [f"of {group['param_names'][0]!r}"] if group.get("param_names") else []
    return f" (group {' '.join(names)})" if names else ""


def complete_group(group: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``group`` with every key its algorithm needs, missing ones taken from ``options``.

    Args:
        group: As a user wrote it, or as a checkpoint holds it. ``algorithm`` defaults to ``"normuon"``, and then
            ``layout`` to ``"o i"``. Keys we do not know (``initial_lr``, ...) are kept.
        options: The arguments of ``NorMuon.__init__`` by name.

    Returns:
        A new dict of primitives, which any checkpoint format stores; ``params`` is passed on as it is.

    Raises:
        ValueError: If the algorithm, the layout or a value is refused.
    """
    complete = {"algorithm": "normuon", **group}
    keys = GROUP_KEYS.get(complete["algorithm"], {})
    for key, option in keys.items():
        complete.setdefault(key, options[option])
    if complete["algorithm"] == "normuon":
        complete.setdefault("layout", DEFAULT_LAYOUT)
    elif complete.get("lr", 0.0) is None:
        complete["lr"] = options["lr"]  # adamw_lr=None
    check_group(complete)
    if isinstance(complete["lr"], Tensor) and not bool(complete["lr"] >= 0):
        raise ValueError(f"lr={complete['lr']!r} must be {CHECKS['lr'][1]}.")
    return {key: _primitive(value) if key in keys else value for key, value in complete.items()}


def _primitive(value: Any) -> Any:
    """Return numpy's numbers as Python's, lists as tuples, dtypes as names; strings and None as they are.

    A tensor is copied. A learning rate that is one tensor in all groups would be scaled once per group by whoever
    scales them one after the other.
    """
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, (bool, str)) or value is None:
        return value
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, Sequence):
        return tuple(_primitive(entry) for entry in value)
    return int(value) if isinstance(value, Integral) else float(value)


def is_flat_shard(parameter: Tensor) -> bool:
    """Return whether a parameter is a flat piece of FSDP1, which marks them (``_fsdp_flattened``)."""
    return bool(getattr(parameter, "_fsdp_flattened", False))


def check_parameter(parameter: Tensor, group: Mapping[str, Any], name: str) -> None:
    """Raise unless the group's algorithm can train ``parameter``; the message names it and the remedy.

    Args:
        parameter: A leaf tensor.
        group: Complete, see ``complete_group``.
        name: Its FQN, or its place in the group.

    Raises:
        TypeError: If the parameter is quantized or not floating point, or complex and not on AdamW.
        ValueError: If its shape does not fit the layout or is not known yet, or its gradient is sparse.
    """
    if parameter.dtype not in TRAINABLE_DTYPES:
        raise TypeError(
            f"NorMuon trains floating-point parameters; {name!r} is {parameter.dtype}. Leave it out of the groups."
        )
    if is_quantized(parameter):
        raise TypeError(
            f"{name!r} is quantized ({type(parameter).__name__}): freeze it, and leave it out of the groups."
        )
    gradient = parameter.grad
    if gradient is not None and gradient.layout != torch.strided:
        raise ValueError(f"{name!r} has a sparse gradient; build its embedding with sparse=False.")
    if group["algorithm"] == "adamw":
        return
    if parameter.dtype in COMPLEX_DTYPES:
        raise TypeError(
            f"The matrices of NorMuon are real; {name!r} is {parameter.dtype}. Put it in a group of algorithm='adamw',"
            " which steps real and imaginary parts (plan_parameters does)."
        )
    if is_lazy(parameter):
        raise ValueError(f"{name!r} of a lazy layer has no shape yet; run one batch through the model first.")
    try:
        parse_layout(group["layout"]).check(parameter.shape)
    except ValueError as error:
        if is_flat_shard(parameter):
            remedy = "It is a flat shard of FSDP1, which hides the matrices: use FSDP2 (fully_shard)."
        elif parameter.ndim < 2:
            remedy = "Put it in an AdamW group (plan_parameters does), or let build_normuon(model) build all groups."
        else:
            remedy = "Give its group a fitting layout or algorithm='adamw' (plan_parameters does)."
        raise ValueError(
            f"NorMuon needs matrices; {name!r} has shape {tuple(parameter.shape)}: {error}. {remedy}"
        ) from None


def parameter_name(group: Mapping[str, Any], index: int) -> str:
    """Return the FQN of parameter ``index`` of ``group``, or its place when the group was built without names."""
    if index < len(group.get("param_names", ())):
        return str(group["param_names"][index])
    return f"parameter {index} of group {group['name']}" if "name" in group else f"parameter {index} of its group"
