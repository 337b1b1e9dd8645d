"""Where each block of a tensor lies on a device mesh. The only file that reads DTensor's placements.

Private names of torch 2.13 used here: ``_StridedShard`` (FSDP2 over tensor parallel, and fused weights under tensor
parallel); nothing public stands for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import product

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from normuon_plugins.distributed.boxes import Box, chunk, join, length, whole


@dataclass(frozen=True, eq=False)
class Blocks:
    """The block of a tensor that every rank holds.

    Attributes:
        ranks: Global ranks, ascending; everything else is indexed by place in this tuple.
        boxes: The global indices that each rank holds.
        replicas: Ranks of equal number hold the tensor once, together.
    """

    ranks: tuple[int, ...]
    boxes: tuple[Box, ...]
    replicas: tuple[int, ...]

    @cached_property
    def replica_count(self) -> int:
        """How many times the tensor is held."""
        return max(self.replicas) + 1

    @property
    def is_replicated(self) -> bool:
        """Whether every rank holds the whole tensor."""
        return self.replica_count == len(self.ranks)

    def restrict(self, ranks: tuple[int, ...]) -> Blocks:
        """Return the same blocks as seen by some of the ranks."""
        places = [self.ranks.index(rank) for rank in ranks]
        replicas = [self.replicas[place] for place in places]
        numbers = {replica: number for number, replica in enumerate(sorted(set(replicas)))}
        return Blocks(
            ranks, tuple(self.boxes[place] for place in places), tuple(numbers[replica] for replica in replicas)
        )


def my_rank() -> int:
    """Return this process's global rank; 0 without a process group."""
    return int(dist.get_rank()) if dist.is_initialized() else 0


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor lies on a mesh (a DTensor), be it in shards or in replicas."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return this rank's block of a DTensor, or a plain tensor as it is. Call it under ``torch.no_grad``."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def compute_device(tensor: Tensor) -> torch.device:
    """Return where a tensor is computed with: the mesh's device for blocks that are offloaded to the CPU."""
    if isinstance(tensor, DTensor) and tensor.device_mesh.device_type != tensor.device.type:
        return torch.device(tensor.device_mesh.device_type)
    return tensor.device


def describe(tensor: Tensor) -> str:
    """Return shape, dtype, placements and mesh in words that are equal on every rank where these are."""
    words = f"{tuple(tensor.shape)} {tensor.dtype}"
    if isinstance(tensor, DTensor):
        words += f" {list(tensor.placements)} on mesh {tensor.device_mesh.mesh.tolist()}"
    return words


def whereabouts(tensor: Tensor) -> tuple[object, ...]:
    """Return shape, device, placements and mesh: what decides where blocks lie, cheap and comparable."""
    if isinstance(tensor, DTensor):
        return (tensor.shape, tensor.device, tensor.placements, tensor.device_mesh)
    return (tensor.shape, tensor.device)


def locate(tensor: Tensor, shape: Sequence[int] | None = None, *, divided: bool = True) -> Blocks:
    """Return the blocks of a tensor on its mesh; a plain tensor lies whole on this rank.

    Args:
        tensor: A DTensor or a plain tensor.
        shape: Of a companion of ``tensor`` that ``zeros`` made; None is ``tensor`` itself.
        divided: See ``companion_placements``.

    Raises:
        ValueError: If a placement is neither a shard nor a replica.
    """
    shape = tuple(tensor.shape) if shape is None else tuple(shape)
    if not isinstance(tensor, DTensor):
        return replicate(shape, (my_rank(),))
    mesh = tensor.device_mesh
    return locate_on_mesh(
        shape,
        companion_placements(tensor.placements, tensor.shape, shape, divided=divided),
        tuple(mesh.shape),
        tuple(mesh.mesh.flatten().tolist()),
    )


@lru_cache(maxsize=1024)
def replicate(shape: tuple[int, ...], ranks: tuple[int, ...]) -> Blocks:
    """Return the blocks of a tensor that every one of ``ranks`` holds whole."""
    return Blocks(tuple(sorted(ranks)), (whole(shape),) * len(ranks), tuple(range(len(ranks))))


@lru_cache(maxsize=1024)
def locate_on_mesh(
    shape: tuple[int, ...], placements: tuple[Placement, ...], mesh_shape: tuple[int, ...], ranks: tuple[int, ...]
) -> Blocks:
    """Return the blocks of a tensor of ``shape``; needs no process.

    Mesh dimensions are applied from left to right, each to what the ones before have left, as DTensor does.

    Args:
        shape: Global shape.
        placements: One per mesh dimension.
        mesh_shape: Size of each mesh dimension.
        ranks: Global ranks of the mesh in row-major order.

    Raises:
        ValueError: If a placement is neither a shard nor a replica.
    """
    found = []
    for rank, coordinate in zip(ranks, product(*map(range, mesh_shape)), strict=True):
        box = list(whole(shape))
        replica = 0
        for placement, parts, index in zip(placements, mesh_shape, coordinate, strict=True):
            if isinstance(placement, Replicate):
                replica = replica * parts + index
            elif isinstance(placement, _StridedShard):
                # A virtual first split into split_factor chunks, each of which is then dealt to the mesh dimension.
                factor = int(placement.split_factor)
                split = [chunk(box[placement.dim], factor, first) for first in range(factor)]
                box[placement.dim] = join([chunk(part, parts, index) for part in split])
            elif isinstance(placement, Shard):
                box[placement.dim] = chunk(box[placement.dim], parts, index)
            else:
                raise ValueError(f"placement {placement!r} is neither a shard nor a replica")
        found.append((rank, tuple(box), replica))
    ordered_ranks, boxes, replicas = zip(*sorted(found), strict=True)
    return Blocks(ordered_ranks, boxes, replicas)


def zeros(parameter: Tensor, shape: Sequence[int], dtype: torch.dtype, *, divided: bool = True) -> Tensor:
    """Return zeros of ``shape`` that lie where ``parameter`` lies: a DTensor for a DTensor.

    Args:
        parameter: What the zeros accompany.
        shape: Global.
        dtype: Of the zeros.
        divided: See ``companion_placements``.
    """
    if not isinstance(parameter, DTensor):
        return torch.zeros(tuple(shape), dtype=dtype, device=parameter.device)
    blocks = locate(parameter, shape, divided=divided)
    box = blocks.boxes[blocks.ranks.index(my_rank())]
    return DTensor.from_local(
        torch.zeros([length(intervals) for intervals in box], dtype=dtype, device=local(parameter).device),
        parameter.device_mesh,
        companion_placements(parameter.placements, parameter.shape, shape, divided=divided),
        run_check=False,
        shape=torch.Size(shape),
        stride=torch.empty(tuple(shape), device="meta").stride(),
    )


def gradient_block(gradient: Tensor, parameter: Tensor) -> Tensor:
    """Return this rank's block of a gradient, placed like the parameter.

    A gradient may come out of autograd with other placements than its parameter (a sum still to be taken); making them
    equal is a collective.
    """
    if isinstance(parameter, DTensor) and isinstance(gradient, DTensor) and gradient.placements != parameter.placements:
        gradient = gradient.redistribute(parameter.device_mesh, parameter.placements)
    return local(gradient)


def sharding_groups(tensor: Tensor) -> tuple[dist.ProcessGroup, ...]:
    """Return the groups of ranks that hold different shards of a tensor: one per mesh dimension that shards it."""
    if not isinstance(tensor, DTensor):
        return ()
    return tuple(
        tensor.device_mesh.get_group(dim)
        for dim, placement in enumerate(tensor.placements)
        if not isinstance(placement, Replicate)
    )


def companion_placements(
    placements: Sequence[Placement], shape: Sequence[int], companion: Sequence[int], *, divided: bool = True
) -> tuple[Placement, ...]:
    """Return the placements of a ``companion`` of a tensor of ``shape``: replicated where a size became 1.

    Args:
        placements: Of the tensor.
        shape: Global.
        companion: Global shape of the companion.
        divided: Whether other dimensions of another size are divided like the tensor's (one number for every 256 of a
            row) or replicated, too (one number for every fused block).
    """
    return tuple(
        Replicate()
        if isinstance(placement, (Shard, _StridedShard))
        and companion[placement.dim] != shape[placement.dim]
        and (companion[placement.dim] == 1 or not divided)
        else placement
        for placement in placements
    )
