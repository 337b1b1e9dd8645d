"""Clip gradients that lie on several meshes, where torch's own clip_grad_norm_ fails."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial, reduce

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from normuon_plugins.distributed.gradients import gradient_blocks, mesh_order, places_alike
from normuon_plugins.distributed.placement import compute_device, local

# Numbers of parameters, by the dimensions of their mesh that divide them.
Shards = dict[tuple[int, ...], list[int]]


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """Scale the gradients so that their norm, as of one vector, is at most ``max_norm``.

    What ``torch.nn.utils.clip_grad_norm_`` does for plain gradients, for any mixture: FSDP2 over tensor parallel leaves
    parameters on a 2-D mesh beside those on a 1-D one, expert parallel two meshes, and torch adds up neither
    (https://github.com/pytorch/torchtitan/blob/main/torchtitan/distributed/utils.py works around it for experts).

    Args:
        parameters: A tensor or an iterable of them, the same on every rank; DTensors and plain ones. Gradients are
            modified in place. One that a rank does not have counts as zero there.
        max_norm: Largest norm that is left.
        norm_type: Which norm; ``math.inf`` is the largest entry.
        error_if_nonfinite: Raise where the norm is NaN or infinite, before anything is scaled.

    Returns:
        The norm before, a plain tensor of one element, float32 or wider. What several ranks hold counts once: they are
        taken to hold the same gradient (DDP, or replicated under tensor parallel). Where they do not, the largest norm
        counts for all ranks of a mesh, so that they scale alike; among plain tensors alone no rank is asked, as in
        torch.

    Raises:
        ValueError: If ``norm_type`` is not above 0.
        RuntimeError: Under ``error_if_nonfinite``, on every rank.
    """
    if not norm_type > 0:
        raise ValueError(f"norm_type={norm_type!r} must be above 0; math.inf is the largest entry.")
    given = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    if not given:
        return torch.tensor(0.0, dtype=torch.float32, device="cpu")
    norm = _norm(given, float(norm_type))
    if error_if_nonfinite and not bool(norm.isfinite()):
        raise RuntimeError(f"the gradients' norm of order {norm_type} is {norm.item()}; nothing was clipped.")
    # As in torch: 1e-6 keeps the factor finite, and a factor above 1 becomes 1 without a question to the device.
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    gradients = [local(parameter.grad) for parameter in given if parameter.grad is not None]
    for places in places_alike(gradients):
        first = gradients[places[0]]
        torch._foreach_mul_([gradients[place] for place in places], factor.to(first.device, first.dtype))
    return norm


def _norm(parameters: Sequence[Tensor], order: float) -> Tensor:
    """Return the norm of all gradients: of the blocks of this rank, then over the ranks of each mesh.

    Nothing here depends on which gradients a rank has, since other ranks may have them, and wait.
    """
    norm_here = partial(_norm_here, parameters, gradient_blocks(parameters), order)
    meshes: dict[DeviceMesh, Shards] = {}
    plain: list[int] = []
    for number, parameter in enumerate(parameters):
        if isinstance(parameter, DTensor):
            meshes.setdefault(parameter.device_mesh, {}).setdefault(_sharded_dims(parameter), []).append(number)
        else:
            plain.append(number)
    replicated = [norm_here(plain)] if plain else []
    sharded: list[Tensor] = []
    for mesh in sorted(meshes, key=mesh_order):
        norms = [_over_shards(norm_here(numbers), mesh, dims, order) for dims, numbers in sorted(meshes[mesh].items())]
        if plain or any(len(dims) < mesh.ndim for dims in meshes[mesh]):
            largest = _largest(_stack([*norms, *replicated]), mesh, range(mesh.ndim))
            norms, replicated = list(largest[: len(norms)]), list(largest[len(norms) :])
        sharded += norms
    return _combine(_stack([*sharded, *replicated]), order)


def _sharded_dims(tensor: DTensor) -> tuple[int, ...]:
    return tuple(dim for dim, placement in enumerate(tensor.placements) if not isinstance(placement, Replicate))


def _norm_here(
    parameters: Sequence[Tensor], blocks: Mapping[int, Tensor], order: float, numbers: Sequence[int]
) -> Tensor:
    """Return the norm of this rank's blocks, in a dtype and on a device that are the same on every rank."""
    device = compute_device(parameters[numbers[0]])
    dtypes = [parameters[number].dtype.to_real() for number in numbers]
    dtype = reduce(torch.promote_types, dtypes, torch.float32)
    norms = [torch.zeros(1, dtype=dtype, device=device)]
    held = [blocks[number] for number in numbers if number in blocks and blocks[number].numel() > 0]
    for places in places_alike(held):
        kind = held[places[0]].dtype
        wide = None if kind.is_complex else torch.promote_types(kind, torch.float32)
        found = torch._foreach_norm([held[place] for place in places], order, dtype=wide)
        norms.append(torch.stack(found).to(device, dtype))
    return _combine(torch.cat(norms), order)


def _stack(norms: Sequence[Tensor]) -> Tensor:
    dtype = reduce(torch.promote_types, [norm.dtype for norm in norms])
    return torch.stack([norm.to(norms[0].device, dtype) for norm in norms])


def _combine(norms: Tensor, order: float) -> Tensor:
    """Return the norm of one vector from those of its parts."""
    norm: Tensor = torch.linalg.vector_norm(norms, order)
    return norm


def _over_shards(norm: Tensor, mesh: DeviceMesh, dims: Sequence[int], order: float) -> Tensor:
    """Return the norm of one vector from that of each rank's part; the ranks along ``dims`` hold different ones."""
    if math.isinf(order):
        return _largest(norm, mesh, dims)
    powers = norm.pow(order)
    for group in _groups(mesh, dims):
        dist.all_reduce(powers, dist.ReduceOp.SUM, group=group)
    return powers.pow(1 / order)


def _largest(norms: Tensor, mesh: DeviceMesh, dims: Sequence[int]) -> Tensor:
    """Return the largest of each norm on the ranks along ``dims``; NaN where any is, which a maximum may lose."""
    numbers = torch.stack([norms.masked_fill(norms.isnan(), 0.0), norms.isnan().to(norms.dtype)])
    for group in _groups(mesh, dims):
        dist.all_reduce(numbers, dist.ReduceOp.MAX, group=group)
    largest: Tensor = numbers[0].masked_fill(numbers[1] > 0, math.nan)
    return largest


def _groups(mesh: DeviceMesh, dims: Sequence[int]) -> list[dist.ProcessGroup]:
    return [mesh.get_group(dim) for dim in dims if mesh.size(dim) > 1]
