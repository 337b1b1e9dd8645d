"""What ranks tell each other of their parameters and options before they step together, in words that must be equal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from normuon_plugins.core.group_options import GROUP_KEYS
from normuon_plugins.core.layout import parse_layout
from normuon_plugins.core.momentum import check_blocks, momentum_dtype
from normuon_plugins.distributed.boxes import length
from normuon_plugins.distributed.placement import Blocks, describe, local, my_rank

# Options of the optimizer that every rank must agree on.
OPTIONS = ("bucket_bytes", "replicas", "kahan_sum", "compile", "orthogonalize_fn", "nonfinite")

# A parameter, its group and name, the dtype of its products (None: no matrix), and where it lies.
Row = tuple[Tensor, Mapping[str, Any], str, torch.dtype | None, Blocks]


@dataclass(frozen=True)
class Facts:
    """What a step of some parameters is planned from.

    Attributes:
        lines: In words: the meshes, then one line for every parameter. See ``check_equal``.
        errors: What is wrong with a parameter, on every rank alike where the lines agree.
    """

    lines: list[str]
    errors: list[str]

    def check(self) -> None:
        """Raise ``ValueError`` with the first error; call it after the lines were compared."""
        if self.errors:
            raise ValueError(self.errors[0])


def compared_facts(rows: Sequence[Row]) -> Facts:
    """Return the facts of parameters that the same ranks hold.

    All options of their groups are among them. What a schedule moves is the same on all ranks at any one step, and is
    compared only when a plan is made.
    """
    meshes: dict[DeviceMesh, str] = {}
    groups: dict[int, str] = {}
    lines: list[str] = []
    errors: list[str] = []
    for number, (parameter, group, name, dtype, blocks) in enumerate(rows):
        if id(group) not in groups:
            groups[id(group)] = _group_in_words(group)
        # A place in a group without names counts what only this rank has, too.
        called = repr(name) if "param_names" in group else f"parameter {number} of those that these ranks share"
        words = f"{called}: {group['algorithm']} {describe(parameter, meshes)}"
        expected = tuple(map(length, blocks.boxes[blocks.ranks.index(my_rank())]))
        with torch.no_grad():
            found = tuple(local(parameter).shape)
        if found != expected:
            words += f", but a local shard {found} where its placements mean {expected}"
            errors.append(f"{words}; build the DTensor from shards of the right shape.")
        products = [] if dtype is None else [f"products in {dtype}"]
        lines.append("; ".join([words, *products, groups[id(group)]]))
        errors += _momentum_errors(parameter, group, name, blocks)
    return Facts([*meshes.values(), *lines], errors)


def options_in_words(options: Mapping[str, Any]) -> str:
    """Return the options of the optimizer that every rank must agree on."""
    return ", ".join(f"{name}={_plain(options[name])!r}" for name in OPTIONS)


def _group_in_words(group: Mapping[str, Any]) -> str:
    """Return the options of a group; reads a tensor's value."""
    keys = [*GROUP_KEYS[group["algorithm"]], *(["layout"] if group["algorithm"] == "normuon" else [])]
    return "; ".join(f"{key}={_plain(group[key])!r}" for key in keys if key != "ns_dtype")


def _plain(value: Any) -> Any:
    """Return an option in one of the forms that it may have: a list that came back from a checkpoint is a tuple.

    A tensor is compared by its value, a function by its name.
    """
    if isinstance(value, Tensor):
        return "on meta" if value.is_meta else value.item()
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, Real) and not isinstance(value, (bool, int)):
        return float(value)
    if callable(value):
        return getattr(value, "__qualname__", type(value).__qualname__)
    return tuple(map(_plain, value)) if isinstance(value, (list, tuple)) else value


def _momentum_errors(parameter: Tensor, group: Mapping[str, Any], name: str, blocks: Blocks) -> list[str]:
    """Return what is wrong where a shard would hold a part of a block of int8 momentum."""
    if group["algorithm"] == "normuon" and momentum_dtype(group, parameter.dtype) == torch.int8:
        try:
            check_blocks(blocks.boxes, parameter.shape, parse_layout(group["layout"]))
        except ValueError as error:
            return [
                f"{name!r} is {describe(parameter)}: {error}. Give its group momentum_dtype='bfloat16', or shard it by"
                " rows."
            ]
    return []
