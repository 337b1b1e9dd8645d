"""Where each block of a tensor lies on a device mesh. The only file that reads DTensor's placements.

Private names of torch 2.13 used here: ``_StridedShard`` (FSDP2 over tensor parallel, and fused weights under tensor
parallel); nothing public stands for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import product

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
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

    @cached_property
    def twins(self) -> tuple[int, ...]:
        """For every place, the first one that holds the same block."""
        first: dict[Box, int] = {}
        return tuple(first.setdefault(box, place) for place, box in enumerate(self.boxes))

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


def describe(tensor: Tensor, meshes: dict[DeviceMesh, str] | None = None) -> str:
    """Return shape, dtype, placements and mesh in words that are equal on every rank where these are.

    Args:
        tensor: Any.
        meshes: In words, in order of appearance; a mesh that is missing is added, and the tensor's named by its number
            there. For many tensors: the ranks of a large mesh fill a page. None spells them out.
    """
    words = f"{tuple(tensor.shape)} {tensor.dtype}"
    if not isinstance(tensor, DTensor):
        return words
    mesh = tensor.device_mesh
    if meshes is None:
        return f"{words} {list(tensor.placements)} on mesh {mesh.mesh.tolist()}"
    if mesh not in meshes:
        meshes[mesh] = f"mesh {len(meshes)}: {mesh.device_type} {mesh.mesh.tolist()}"
    return f"{words} {list(tensor.placements)} on mesh {list(meshes).index(mesh)}"


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
        ValueError: If a placement is neither a shard nor a replica, or the ranks of the mesh do not ascend along a
            dimension that has shards.
    """
    shape = tuple(tensor.shape) if shape is None else tuple(shape)
    if not isinstance(tensor, DTensor):
        return replicate(shape, (my_rank(),))
    mesh_shape, ranks = tuple(tensor.device_mesh.shape), tuple(tensor.device_mesh.mesh.flatten().tolist())
    _check_order(tensor.placements, mesh_shape, ranks)
    placements = companion_placements(tensor.placements, tensor.shape, shape, divided=divided)
    return locate_on_mesh(shape, placements, mesh_shape, ranks)


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
                raise ValueError(f"placement {placement!r} is neither a shard nor a replica; redistribute it first")
        found.append((rank, tuple(box), replica))
    ordered_ranks, boxes, replicas = zip(*sorted(found), strict=True)
    return Blocks(ordered_ranks, boxes, replicas)


@lru_cache(maxsize=1024)
def _check_order(placements: tuple[Placement, ...], mesh_shape: tuple[int, ...], ranks: tuple[int, ...]) -> None:
    """Raise ``ValueError`` where torch contradicts itself about who holds which shard.

    Its offsets go by the place in the mesh, its collectives by the rank in the group, which are ascending there.
    """
    for dim, placement in enumerate(placements):
        step = math.prod(mesh_shape[dim + 1 :])
        for place in range(len(ranks) - step):
            is_last = place // step % mesh_shape[dim] == mesh_shape[dim] - 1
            if not (is_last or isinstance(placement, Replicate) or ranks[place] < ranks[place + step]):
                raise ValueError(
                    f"its mesh has rank {ranks[place]} before rank {ranks[place + step]} along dimension {dim}, and"
                    " torch's collectives take the shards in ascending order; build the mesh in that order"
                )


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
    placed = DTensor.from_local(
        torch.empty([length(intervals) for intervals in box], dtype=dtype, device="meta"),
        parameter.device_mesh,
        companion_placements(parameter.placements, parameter.shape, shape, divided=divided),
        run_check=False,
        shape=torch.Size(shape),
        stride=torch.empty(tuple(shape), device="meta").stride(),
    )
    # Not the zeros themselves: from_local moves what it gets to the mesh's device, and parameters may be offloaded.
    return torch.zeros_like(placed, device=local(parameter).device)


def mesh_groups(tensor: Tensor) -> tuple[dist.ProcessGroup, ...]:
    """Return the process groups that the tensor's mesh has already, one per dimension; none for a plain tensor."""
    return tuple(tensor.device_mesh.get_all_groups()) if isinstance(tensor, DTensor) else ()


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
