"""What DistributedDataParallel does to gradients in this step, and whether ranks that share work agree.

Private names of torch 2.13 used here, for which nothing public stands: ``_join_config`` and ``_comm_hooks`` of DDP,
``_ddp_params_and_buffers_to_ignore`` of the model in it, ``_ddp_ignored`` of a parameter.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

# How far two norms of equal numbers may differ, of the larger one: another kernel may add in another order.
TOLERANCE = 1e-3


def find_ddp(model: object) -> DistributedDataParallel | None:
    """Return the DistributedDataParallel around or in ``model``, or None."""
    if not isinstance(model, nn.Module):
        return None
    return next((module for module in model.modules() if isinstance(module, DistributedDataParallel)), None)


def reshard(model: nn.Module) -> None:
    """Let FSDP2 put its shards back into a model: after a forward without backward the root holds whole parameters."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


class Averaging:
    """Asked at every step: whether DDP makes the gradients of all replicas equal.

    Args:
        model: With a DistributedDataParallel around it or in it; not kept alive. Without one nobody knows, which counts
            as yes.
    """

    def __init__(self, model: object = None) -> None:
        ddp = find_ddp(model)
        self._ddp = None if ddp is None else weakref.ref(ddp)
        self._ignored = frozenset(_ignored(model if ddp is None else ddp.module))

    def leaves_alone(self, parameter: Tensor) -> bool:
        """Return whether DDP was told to ignore a parameter: every rank has a gradient of its own."""
        return id(parameter) in self._ignored or getattr(parameter, "_ddp_ignored", False)

    def is_on(self) -> bool:
        """Return False inside ``no_sync()`` (local SGD), inside ``Join``, and under a hook that averages weights."""
        ddp = None if self._ddp is None else self._ddp()
        if ddp is None:
            return True
        return ddp.require_backward_grad_sync and not ddp._join_config.enable and not _averages_later(ddp)


def _ignored(module: object) -> Iterator[int]:
    """Yield the identities of the parameters that DDP was told to ignore, by their names in what it wraps."""
    names = set(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))
    if names and isinstance(module, nn.Module):
        yield from (id(parameter) for name, parameter in module.named_parameters() if name in names)


def _averages_later(ddp: DistributedDataParallel) -> bool:
    """Return whether a communication hook leaves the ranks apart: torch's ``post_localSGD_hook``."""
    return any(getattr(hook, "__name__", "") == "post_localSGD_hook" for hook, _ in ddp._comm_hooks)


def first_difference(
    values: Tensor, twins: Sequence[Sequence[int]], group: dist.ProcessGroup
) -> tuple[int, int] | None:
    """Compare numbers that several ranks should have alike; the same answer on every rank of the group.

    Args:
        values: This rank's, shape ``(count,)``, float32, on a device that the group moves.
        twins: For every number, the place of the first rank that has the same one, by place.
        group: The ranks; all of them call.

    Returns:
        Which number differs, and the place of a rank that has another one than its twin; None if all agree.
    """
    every = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, values, group=group)
    found = torch.stack(every).cpu()  # (ranks, count)
    expected = found.gather(0, torch.tensor(twins, device="cpu").T)
    apart = ~torch.isclose(found, expected, rtol=TOLERANCE, atol=0.0, equal_nan=True)
    if not bool(apart.any()):
        return None
    place, number = apart.nonzero()[0].tolist()
    return number, place
