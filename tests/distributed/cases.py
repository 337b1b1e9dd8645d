"""Awkward parameters, the ways to lay them out over ranks, and a short run of them."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from normuon_plugins import NorMuon

# name, which says why -> layout (None: AdamW), shape
PARAMETERS = {
    "rows_divide": ("o i", (8, 6)),
    "rows_do_not_divide": ("o i", (5, 7)),
    "fewer_rows_than_ranks": ("o i", (2, 9)),
    "one_row": ("o i", (1, 6)),
    "one_column": ("o i", (6, 1)),
    "tall": ("o i", (24, 4)),
    "square_like_the_first": ("o i", (8, 8)),
    "same_shape_again": ("o i", (8, 6)),
    "transposed": ("i o", (6, 8)),
    "convolution": ("o i i", (6, 4, 3)),
    "transposed_convolution": ("i o i", (4, 6, 3)),
    "experts": ("e o i", (4, 6, 5)),
    "experts_do_not_divide": ("e o i", (3, 4, 6)),
    "transposed_experts": ("e i o", (4, 6, 8)),
    "fused": ("o=4+2+2 i", (8, 5)),
    "fused_across_shards": ("o=3*3 i", (9, 4)),
    "fused_columns": ("i o=2*4", (4, 8)),
    "interleaved": ("o%2+1 i", (12, 4)),
    "interleaved_experts": ("e i o%1+1", (4, 6, 8)),
    "bias": (None, (7,)),
    "scalar_gain": (None, (1,)),
    "embedding": (None, (9, 4)),
}


def tensors(seed, dtype=torch.float32):
    """Return a tensor per parameter in order of name, with rows that span two decades of scale."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {}
    for name, (_, shape) in sorted(PARAMETERS.items()):
        scales = torch.logspace(-1, 1, shape[0]).view(-1, *[1] * (len(shape) - 1))
        drawn[name] = (torch.randn(shape, generator=generator) * scales).to(dtype)
    return drawn


def optimizer_of(named, **options):
    """Return NorMuon over (name, parameter) pairs by the table above."""
    groups = {}
    for name, parameter in named:
        layout = PARAMETERS[name.split(".")[-1]][0]
        group = {"params": [], "algorithm": "adamw"} if layout is None else {"params": [], "layout": layout}
        groups.setdefault(layout, group)["params"].append((name, parameter))
    ordered = sorted(groups.values(), key=lambda group: "layout" not in group)
    return NorMuon(ordered, **{"lr": 0.1, "weight_decay": 0.1, "nesterov": True, **options})


def place_like(tensor, parameter):
    """Return ``tensor`` sharded like ``parameter``, without a message."""
    if not isinstance(parameter, DTensor):
        return tensor.clone()
    return distribute_tensor(tensor.clone(), parameter.device_mesh, parameter.placements, src_data_rank=None)


def steps(model, optimizer, first, last):
    """Take steps ``first`` to ``last`` with gradients that depend on the step and the name alone."""
    for step in range(first, last):
        gradients = tensors(1000 + step)
        for name, parameter in model.named_parameters():
            parameter.grad = place_like(gradients[name.split(".")[-1]].to(parameter.dtype), parameter)
        optimizer.step()


def plain(dtype=torch.float32):
    """Return all parameters in one module."""
    return nn.ParameterDict({name: nn.Parameter(tensor) for name, tensor in tensors(0, dtype).items()})


def gathered(tensor):
    """Return the whole tensor, detached."""
    if not isinstance(tensor, DTensor):
        return tensor.detach().clone()
    if any(isinstance(placement, _StridedShard) for placement in tensor.placements) and tensor.device_mesh.ndim == 1:
        return gathered_by_number(tensor)
    return tensor.full_tensor().detach().clone()


def gathered_by_number(tensor):
    """Return the whole tensor where torch 2.11 cannot: it refuses to gather a ``_StridedShard`` that stands alone."""
    numbers = torch.arange(tensor.numel()).view(tensor.shape)
    mine = distribute_tensor(numbers, tensor.device_mesh, tensor.placements, src_data_rank=None).to_local()
    pieces = [None] * tensor.device_mesh.size()
    found = (mine.flatten(), tensor.detach().to_local().flatten())
    dist.all_gather_object(pieces, found, group=tensor.device_mesh.get_group())
    whole = torch.full((tensor.numel(),), float("nan"), dtype=tensor.dtype)
    for places, values in pieces:
        whole[places] = values
    return whole.view(tensor.shape)


def whole_run(model, optimizer):
    """Return all parameters and states as whole tensors, by name."""
    found = {}
    for name, parameter in model.named_parameters():
        short = name.split(".")[-1]
        found[short] = gathered(parameter)
        found |= {f"{short}.{key}": gathered(value) for key, value in optimizer.state[parameter].items()}
    return found


def dtensors(mesh, placements, dtype=torch.float32):
    """Return a maker of a model of DTensors; ``placements`` is a function of the shape."""

    def make():
        return nn.ParameterDict(
            {
                name: nn.Parameter(distribute_tensor(tensor, mesh, placements(tensor.shape), src_data_rank=None))
                for name, tensor in tensors(0, dtype).items()
            }
        )

    return make


def fsdp(mesh, dtype=torch.float32, **options):
    """Return a maker of an FSDP2 model."""

    def make():
        return fully_shard(plain(dtype), mesh=mesh, **options)

    return make


def tensor_parallel_fsdp(mesh, dim, dtype=torch.float32):
    """Return a maker of an FSDP2 model over tensor parallel shards of dimension ``dim``, where it divides evenly."""

    def make():
        tp = mesh["tp"]
        model = nn.ParameterDict()
        for name, tensor in tensors(0, dtype).items():
            divides = tensor.ndim > dim and tensor.shape[dim] % tp.size() == 0
            placement = Shard(dim) if divides else Replicate()
            model[name] = nn.Parameter(distribute_tensor(tensor, tp, [placement], src_data_rank=None))
        return fully_shard(model, mesh=mesh["dp"])

    return make


def expert_parallel(mesh, experts_mesh, dtype=torch.float32):
    """Return a maker of a model whose experts lie on ``('efsdp', 'ep')`` and the rest on ``('fsdp',)``."""

    def make():
        model = nn.ModuleDict({"experts": nn.ParameterDict(), "rest": nn.ParameterDict()})
        for name, tensor in tensors(0, dtype).items():
            if name in ("experts", "transposed_experts", "interleaved_experts"):
                ep = experts_mesh["ep"]
                model["experts"][name] = nn.Parameter(distribute_tensor(tensor, ep, [Shard(0)], src_data_rank=None))
            else:
                model["rest"][name] = nn.Parameter(tensor)
        fully_shard(model["experts"], mesh=experts_mesh["efsdp"], shard_placement_fn=lambda parameter: Shard(1))
        fully_shard(model["rest"], mesh=mesh)
        return model

    return make


def sharded_dim(dim):
    """Return placements on one mesh dimension: ``Shard(dim)`` where there is such a dimension."""
    return lambda shape: [Shard(dim % len(shape)) if -len(shape) <= dim < len(shape) else Replicate()]


def even_columns(parameter):
    """Shard columns where FSDP2 can (it wants them even), else rows."""
    world = dist.get_world_size()
    return Shard(1) if parameter.ndim > 1 and parameter.shape[1] % world == 0 else Shard(0)


def ways(dtype=torch.float32):
    """Return the ways to lay the parameters out over the ranks of this world: makers of a model, by name."""
    world = dist.get_world_size()
    line = init_device_mesh("cpu", (world,), mesh_dim_names=("fsdp",))
    found = {
        "fsdp": fsdp(line, dtype),
        "fsdp columns": fsdp(line, dtype, shard_placement_fn=even_columns),
        "fsdp offloaded": fsdp(line, dtype, offload_policy=CPUOffloadPolicy(pin_memory=False)),
        "columns, uneven and empty": dtensors(line, sharded_dim(1), dtype),
        "last dimension": dtensors(line, sharded_dim(-1), dtype),
        "replicated": dtensors(line, lambda shape: [Replicate()], dtype),
        "packed tensor parallel": dtensors(line, lambda shape: [_StridedShard(0, split_factor=2)], dtype),
    }
    if world == 4:
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        experts = init_device_mesh("cpu", (2, 2), mesh_dim_names=("efsdp", "ep"))
        found |= {
            "hsdp": fsdp(square, dtype),
            "rows then replicas": dtensors(square, lambda shape: [Shard(0), Replicate()], dtype),
            "rows and columns": dtensors(square, lambda shape: [Shard(0), *sharded_dim(1)(shape)], dtype),
            "fsdp over column-wise tp": tensor_parallel_fsdp(square, 0, dtype),
            "fsdp over row-wise tp": tensor_parallel_fsdp(square, 1, dtype),
            "expert parallel": expert_parallel(line, experts, dtype),
        }
    return found
