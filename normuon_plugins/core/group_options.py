"""What a parameter group says: the keys of each algorithm, where their values come from, and which are refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from normuon_plugins.core.layout import parse_layout
from normuon_plugins.core.orthogonalize import resolve_preset
from normuon_plugins.core.update_rules import ADJUST_LR_FNS

DEFAULT_LAYOUT = "o i"
# float16 is missing on purpose: its range ends at 65504 and 6e-8, and momentum has no loss scale.
NS_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}

# Group key -> the option of NorMuon.__init__ whose value it takes when the group does not say.
GROUP_KEYS = {
    "normuon": {
        key: key
        for key in (
            "lr",
            "weight_decay",
            "momentum",
            "nesterov",
            "ns_coefficients",
            "eps",
            "ns_steps",
            "adjust_lr_fn",
            "beta2",
            "normalize_neurons",
            "ns_dtype",
        )
    },
    "adamw": {
        "lr": "adamw_lr",
        "betas": "adamw_betas",
        "eps": "adamw_eps",
        "weight_decay": "adamw_weight_decay",
    },
}


def complete_group(group: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``group`` with every key its algorithm needs, missing ones taken from ``options``.

    Args:
        group: As a user wrote it, or as a checkpoint holds it. ``algorithm`` defaults to ``"normuon"``, and then
            ``layout`` to ``"o i"``. Keys we do not know (``initial_lr``, ...) are kept.
        options: The arguments of ``NorMuon.__init__`` by name.

    Returns:
        A new dict of primitives; ``params`` is passed on as it is.

    Raises:
        ValueError: If the algorithm, the layout or a value is refused.
    """
    algorithm = group.get("algorithm", "normuon")
    if algorithm not in GROUP_KEYS:
        raise ValueError(f"algorithm={algorithm!r} is not known; use one of {tuple(GROUP_KEYS)}.")
    complete = {**group, "algorithm": algorithm}
    for key, option in GROUP_KEYS[algorithm].items():
        complete.setdefault(key, options[option])
    if algorithm == "adamw":
        if complete["lr"] is None:
            complete["lr"] = options["lr"]
        if "layout" in complete:
            raise ValueError(f"layout={complete['layout']!r} belongs to algorithm='normuon'; this group says 'adamw'.")
    else:
        complete.setdefault("layout", DEFAULT_LAYOUT)
        complete["ns_dtype"] = dtype_name(complete["ns_dtype"])
        parse_layout(complete["layout"])
    for key in GROUP_KEYS[algorithm]:
        check_option(key, complete[key])
    return complete


def check_option(name: str, value: Any) -> None:
    """Raise ``ValueError`` when ``value`` is outside the range of the group key or option ``name``."""
    key = name.removeprefix("adamw_")
    if key == "lr":
        number = isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1)
        _require(number and value >= 0, name, value, "a number or a one-element tensor, at least 0")
    elif key in ("weight_decay", "eps"):
        _require(isinstance(value, Real) and float(value) >= 0, name, value, "a number, at least 0")
    elif key in ("momentum", "beta2"):
        _require(_is_decay(value), name, value, "a number in [0, 1)")
    elif key == "betas":
        pair = isinstance(value, Sequence) and len(value) == 2
        _require(pair and all(map(_is_decay, value)), name, value, "two numbers in [0, 1)")
    elif key == "ns_steps":
        whole = isinstance(value, int) and not isinstance(value, bool)
        _require(whole and 1 <= value < 100, name, value, "a whole number from 1 to 99")
    elif key in ("nesterov", "normalize_neurons"):
        _require(isinstance(value, bool), name, value, "True or False")
    elif key == "adjust_lr_fn":
        _require(value in ADJUST_LR_FNS, name, value, f"one of {ADJUST_LR_FNS}")
    elif key == "ns_coefficients":
        resolve_preset(value)
    elif key == "ns_dtype":
        dtype_name(value)
    elif key == "nonfinite":
        _require(value in ("propagate", "skip", "raise"), name, value, "'propagate', 'skip' or 'raise'")
    elif key == "bucket_bytes":
        _require(isinstance(value, int) and value >= 1, name, value, "a whole number of bytes, at least 1")
    elif key == "orthogonalize_fn":
        _require(value is None or callable(value), name, value, "a function of (batch, rows, cols), or None")


def dtype_name(ns_dtype: torch.dtype | str | None) -> str | None:
    """Return ``"bfloat16"`` for ``torch.bfloat16`` and for ``"bfloat16"``; None stays None.

    Raises:
        ValueError: If Newton-Schulz does not run in that dtype.
    """
    if ns_dtype is None:
        return None
    name = str(ns_dtype).removeprefix("torch.")
    if name not in NS_DTYPES:
        raise ValueError(f"ns_dtype={ns_dtype!r} must be one of {tuple(NS_DTYPES)}, or None to choose by device.")
    return name


def check_parameter(parameter: Tensor, name: str, group: Mapping[str, Any]) -> None:
    """Raise unless the group's algorithm can train ``parameter``; the message names it and the remedy.

    Args:
        parameter: A leaf tensor.
        name: Its FQN, or its place in the group.
        group: Complete, see ``complete_group``.

    Raises:
        TypeError: If the dtype is complex or not floating point.
        ValueError: If the shape does not fit the layout.
    """
    if not parameter.is_floating_point():
        raise TypeError(f"NorMuon trains real floating-point parameters; {name!r} is {parameter.dtype}. Freeze it.")
    if group["algorithm"] == "adamw":
        return
    layout = parse_layout(group["layout"])
    try:
        layout.check(parameter.shape)
    except ValueError as error:
        if hasattr(parameter, "_fsdp_flattened"):
            remedy = "It is a flat shard of FSDP1, which hides the matrices: use FSDP2 (fully_shard)."
        elif parameter.ndim < 2:
            remedy = "Put it in an AdamW group (plan_parameters does)."
        else:
            remedy = "Give its group a fitting layout or algorithm='adamw' (plan_parameters does)."
        raise ValueError(
            f"NorMuon needs matrices; {name!r} has shape {tuple(parameter.shape)}: {error}. {remedy}"
        ) from None


def parameter_name(group: Mapping[str, Any], index: int) -> str:
    """Return the FQN of parameter ``index`` of ``group``, or its place when the group was built without names."""
    if "param_names" in group:
        return str(group["param_names"][index])
    return f"parameter {index} of group {group['name']}" if "name" in group else f"parameter {index} of its group"


def _is_decay(value: Any) -> bool:
    return isinstance(value, Real) and 0 <= float(value) < 1


def _require(condition: object, name: str, value: Any, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name}={value!r} must be {expected}.")
