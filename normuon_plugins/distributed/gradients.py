"""Gradients that do not lie as their parameters do: brought there by all ranks together, also by those without one."""

from __future__ import annotations

from collections.abc import Container, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor import zeros as placed_zeros

from normuon_plugins.distributed.placement import compute_device, local

# What autograd may leave of a gradient along a mesh dimension. A place in this list, from 1, is a digit of a code.
PLACEMENTS: tuple[Placement, ...] = (Partial("sum"), Partial("avg"), Replicate(), *map(Shard, range(8)))


def is_elsewhere(parameter: Tensor) -> bool:
    """Return whether a gradient has other placements than its parameter: making them equal is a collective."""
    gradient = parameter.grad
    return (
        isinstance(parameter, DTensor) and isinstance(gradient, DTensor) and gradient.placements != parameter.placements
    )


def places_alike(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Return the places of tensors that share device and dtype: what a function of many tensors takes at once."""
    found: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for place, tensor in enumerate(tensors):
        found.setdefault((tensor.device, tensor.dtype), []).append(place)
    return list(found.values())


def mesh_order(mesh: DeviceMesh) -> tuple[int, list[int], tuple[int, ...]]:
    """Return by what meshes are visited: an order that is the same on all ranks that share any of them has no cycle."""
    return mesh.size(), mesh.mesh.flatten().tolist(), tuple(mesh.shape)


def gradient_blocks(parameters: Sequence[Tensor], asked: Container[int] | None = None) -> dict[int, Tensor]:
    """Return this rank's block of every gradient, placed like its parameter, by the parameter's number.

    A gradient may come out of autograd with other placements (a sum still to be taken). All ranks of the mesh then
    bring it to its parameter's, and one that has no gradient has to join with zeros, of which it must be told: by one
    all-reduce of one number per parameter, for every mesh, which only a rank that misses a gradient waits for.

    Args:
        parameters: On all ranks of a mesh the same of them, in the same order.
        asked: Numbers of those that ranks tell each other about; None for all. For the others a rank without a gradient
            does not join.
    """
    meshes: dict[DeviceMesh, list[int]] = {}
    for number, parameter in enumerate(parameters):
        if isinstance(parameter, DTensor) and (asked is None or number in asked or is_elsewhere(parameter)):
            meshes.setdefault(parameter.device_mesh, []).append(number)
    found = {
        number: local(parameter.grad)
        for number, parameter in enumerate(parameters)
        if parameter.grad is not None and not is_elsewhere(parameter)
    }
    for mesh in sorted(meshes, key=mesh_order):
        told = _tell(parameters, [number for number in meshes[mesh] if asked is None or number in asked], mesh)
        for number in meshes[mesh]:
            if number in told or is_elsewhere(parameters[number]):
                found[number] = _bring(parameters[number], told.get(number))
    return dict(sorted(found.items()))


def _tell(parameters: Sequence[Tensor], numbers: Sequence[int], mesh: DeviceMesh) -> dict[int, list[Placement]]:
    """Return the placements of the gradients that any rank of the mesh has elsewhere, as far as this rank must know."""
    groups = [group for group in mesh.get_all_groups() if group.size() > 1]
    if not numbers or not groups:
        return {}
    codes = [_encode(parameters[number]) for number in numbers]
    device = compute_device(parameters[numbers[0]])
    # The usual note is made on the device: a list would have to be copied there.
    note = (
        torch.tensor(codes, device=device) if any(codes) else torch.zeros(len(codes), dtype=torch.int64, device=device)
    )
    for group in groups:
        dist.all_reduce(note, dist.ReduceOp.MAX, group=group)
    if any(parameters[number].grad is None and parameters[number].requires_grad for number in numbers):
        codes = note.tolist()
    return {number: _decode(code, mesh.ndim) for number, code in zip(numbers, codes, strict=True) if code}


def _encode(parameter: Tensor) -> int:
    """Return a number for the placements of a gradient that lies elsewhere; 0 for any other, or none."""
    code = 0
    if is_elsewhere(parameter):
        assert isinstance(parameter.grad, DTensor)
        for placement in parameter.grad.placements:
            if placement not in PLACEMENTS:
                return 0
            code = code * (len(PLACEMENTS) + 1) + PLACEMENTS.index(placement) + 1
    return code


def _decode(code: int, dimensions: int) -> list[Placement]:
    placements = []
    for _ in range(dimensions):
        code, digit = divmod(code, len(PLACEMENTS) + 1)
        placements.append(PLACEMENTS[digit - 1])
    return placements[::-1]


def _bring(parameter: Tensor, placements: Sequence[Placement] | None) -> Tensor:
    """Return this rank's block of a gradient, brought to its parameter's placements; zeros take part where none is."""
    assert isinstance(parameter, DTensor)
    mesh, gradient = parameter.device_mesh, parameter.grad
    if gradient is None:
        gradient = placed_zeros(parameter.shape, dtype=parameter.dtype, device_mesh=mesh, placements=placements)
    assert isinstance(gradient, DTensor)
    return local(gradient.redistribute(mesh, parameter.placements)).to(local(parameter).device)
