"""From a live optimizer, on any mesh: once, or at every k-th step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from normuon_plugins.core.group_options import parameter_name
from normuon_plugins.core.layout import parse_layout
from normuon_plugins.core.momentum import stored_momentum
from normuon_plugins.core.names import has_match
from normuon_plugins.core.optimizer import NorMuon
from normuon_plugins.core.optimizer_state import MEAN_SQUARE_KEY
from normuon_plugins.core.update_rules import nesterov_update
from normuon_plugins.core.wrappers import find_normuon
from normuon_plugins.diagnostics.report import check_target, write_report
from normuon_plugins.diagnostics.spectra import (
    PER_PARAMETER,
    Diagnosis,
    MatrixDiagnosis,
    diagnose_parameter,
    shows_the_same,
    with_distinct_names,
)
from normuon_plugins.distributed.placement import compute_device, local, locate, my_rank

NESTEROV_NOTE = (
    "The steps look ahead with the last gradient (nesterov=True), which is not kept: momentum stands for what was"
    " orthogonalized."
)

Ranks = tuple[int, ...]


class Member(NamedTuple):
    """A matrix parameter that is looked at, and the ranks that may each diagnose a part of it."""

    name: str
    group: Mapping[str, Any]
    parameter: Tensor
    ranks: Ranks


@torch.no_grad()
def diagnose(
    optimizer: Any, *, match: str = "", per_parameter: int = PER_PARAMETER, gradients: bool = False
) -> Diagnosis:
    """Return singular values and neuron norms of the last step's momentum and directions.

    Under a process group every rank calls this, with the same arguments, and gets the same result: a sharded matrix is
    gathered whole, one at a time, and the ranks that hold it divide the decompositions among them. A decomposition
    of a 4096 x 4096 matrix takes two CPU cores 15 s, and there are three per matrix: give ``match`` for a large model.

    Args:
        optimizer: A ``NorMuon``, or a framework's wrapper of one (``.optimizer``). Not modified.
        match: Regular expression; only parameters with a match in their name are looked at.
        per_parameter: At most so many matrices of a parameter that holds several (experts, heads), evenly spaced.
        gradients: Whether ``.grad`` is still that of the last step, as right after ``step()``: with ``nesterov=True``
            the look-ahead is then what the step made of both. Otherwise momentum stands for it, and a note says so.

    Raises:
        TypeError: If there is no NorMuon in ``optimizer``.
        ValueError: If no matrix parameter has state (no step was taken), or ``match`` names none.

    Example:
        >>> weight = torch.nn.Parameter(torch.eye(3))
        >>> optimizer = NorMuon([("weight", weight)])
        >>> (weight * torch.diag(torch.tensor([3.0, 2.0, 1.0]))).sum().backward()
        >>> optimizer.step()
        >>> round(diagnose(optimizer).matrices[0].stages["momentum"].condition_number, 4)
        3.0
    """
    inner = unwrap(optimizer)
    members = _members(inner, match)
    known = _known_gradients(members) if gradients else set()
    found: list[tuple[int, MatrixDiagnosis]] = []
    guessed = False
    for number, (name, group, parameter, ranks) in enumerate(members):
        state = inner.state[parameter]
        momentum = _whole_momentum(state, group)
        neurons = _whole(state["second_momentum_buffer"])
        mean_square = _whole(state[MEAN_SQUARE_KEY]) if MEAN_SQUARE_KEY in state else None
        look_ahead, gradient = None, parameter.grad
        if number in known and gradient is not None:
            look_ahead = nesterov_update(momentum, _whole(gradient), momentum=group["momentum"])
        guessed |= group["nesterov"] and look_ahead is None
        if my_rank() == ranks[number % len(ranks)]:
            matrices = diagnose_parameter(
                name,
                momentum,
                neurons,
                group,
                gradient_mean_square=mean_square,
                look_ahead=look_ahead,
                orthogonalize_fn=inner.defaults["orthogonalize_fn"],
                per_parameter=per_parameter,
            )
            found += [(number, matrix) for matrix in matrices]
    every = _gather(found)
    if not every:
        raise ValueError(
            f"no matrix parameter has a match of {match!r} in its name and state: take a step first."
            if match
            else "no matrix parameter has state yet: take a step first."
        )
    return Diagnosis("a live optimizer", with_distinct_names(every), (NESTEROV_NOTE,) if guessed else ())


def watch(
    optimizer: Any,
    *,
    every: int,
    folder: str | Path = "diagnostics",
    first_step: int = 0,
    match: str = "",
    per_parameter: int = PER_PARAMETER,
    suffix: str = ".html",
) -> RemovableHandle:
    """Write a report of every ``every``-th step to ``folder``, as ``step-000100.html`` and so on.

    Works in every framework, since it hangs on the optimizer itself. Every rank calls this; rank 0 writes.

    Args:
        optimizer: As in ``diagnose``.
        every: Steps between reports.
        folder: Created when the first report is written.
        first_step: Steps that were taken before, in a resumed run.
        match: As in ``diagnose``.
        per_parameter: As in ``diagnose``.
        suffix: ``".html"``, ``".png"`` or ``".json"``.

    Returns:
        A handle whose ``remove()`` ends the reports.

    Raises:
        TypeError: If there is no NorMuon in ``optimizer``.
        ValueError: If ``every`` is less than 1, or ``suffix`` not known.
        ImportError: If matplotlib is missing.
    """
    if every < 1:
        raise ValueError(f"every={every} must be at least 1 step.")
    check_target(Path("step").with_suffix(suffix))
    taken = first_step

    def report(stepped: Any, args: Any, kwargs: Any) -> None:
        nonlocal taken
        taken += 1
        if taken % every == 0:
            diagnosis = diagnose(stepped, match=match, per_parameter=per_parameter, gradients=True)
            if my_rank() == 0:
                write_report(diagnosis, Path(folder) / f"step-{taken:06d}{suffix}", title=f"Step {taken}")

    return unwrap(optimizer).register_step_post_hook(report)


def unwrap(optimizer: Any) -> NorMuon:
    """Return the NorMuon inside the wrappers of a framework, which keep it as ``.optimizer``.

    Raises:
        TypeError: If there is none.
    """
    found = find_normuon(optimizer)
    if found is None:
        inner = getattr(optimizer, "optimizer", optimizer)
        raise TypeError(f"diagnostics look at a NorMuon; this is a {type(inner).__name__}.")
    return found


def _members(optimizer: NorMuon, match: str) -> list[Member]:
    """Return the matrix parameters that were stepped and whose name has a match."""
    return [
        Member(name, group, parameter, _ranks(parameter, optimizer))
        for group in optimizer.param_groups
        if group["algorithm"] == "normuon"
        for index, parameter in enumerate(group["params"])
        # asked by get: reading a missing key would leave an empty entry in the state
        if "momentum_buffer" in optimizer.state.get(parameter, {})
        and has_match(match, name := parameter_name(group, index))
    ]


def _known_gradients(members: Sequence[Member]) -> set[int]:
    """Return the numbers of the parameters that look ahead and have a gradient on every rank that holds them."""
    looking = {(number, member.ranks): member for number, member in enumerate(members) if member.group.get("nesterov")}
    missing = {key for key, member in looking.items() if member.parameter.grad is None}
    every = [missing]
    if dist.is_available() and dist.is_initialized():
        every = [set() for _ in range(dist.get_world_size())]
        dist.all_gather_object(every, missing)
    return {number for number, _ in looking.keys() - set().union(*every)}


def _ranks(parameter: Tensor, optimizer: NorMuon) -> Ranks:
    """Return the ranks that hold a parameter and may each diagnose a part; this one alone for a plain tensor.

    Plain parameters that are equal on the ranks of a process group (DDP) are known by that option.
    """
    group = optimizer.defaults["process_group"]
    if not isinstance(parameter, DTensor) and group is not None:
        return tuple(sorted(dist.get_process_group_ranks(group)))
    return locate(parameter).ranks


def _whole_momentum(state: Mapping[str, Tensor], group: Mapping[str, Any]) -> Tensor:
    """Return the momentum of a whole parameter in floating point."""
    buffer = state["momentum_buffer"]
    if buffer.is_floating_point():
        return _whole(buffer)
    blocks = {key: local(state[key]) for key in ("momentum_buffer", "momentum_scale")}
    decoded = stored_momentum(blocks, parse_layout(group["layout"])).load(torch.float32)
    if isinstance(buffer, DTensor):
        return _whole(
            DTensor.from_local(
                decoded,
                buffer.device_mesh,
                buffer.placements,
                run_check=False,
                shape=buffer.shape,
                stride=buffer.stride(),
            )
        )
    return decoded


def _whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor on every rank that holds a part of it, which all call this."""
    if not isinstance(tensor, DTensor):
        return tensor
    device = compute_device(tensor)
    if device != tensor.device:  # offloaded to the CPU, from where the mesh cannot send
        tensor = cast(DTensor, tensor.to(device))
    whole: Tensor = tensor.full_tensor()
    return whole


def _gather(found: list[tuple[int, MatrixDiagnosis]]) -> list[MatrixDiagnosis]:
    """Return what all ranks found, in the order of the parameters' numbers, replicas once.

    Plain parameters may be replicas of each other, or those of several stages of a pipeline. The same number and name
    on other ranks are a replica where they also show the same.
    """
    lists = [found]
    if dist.is_available() and dist.is_initialized():
        lists = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(lists, found)
    shown: dict[tuple[int, str], list[MatrixDiagnosis]] = {}
    for number, matrix in sorted((entry for rank in lists for entry in rank), key=itemgetter(0)):
        namesakes = shown.setdefault((number, matrix.name), [])
        if not any(shows_the_same(matrix, other) for other in namesakes):
            namesakes.append(matrix)
    return [matrix for namesakes in shown.values() for matrix in namesakes]
