"""Build and prepare in one call, so that model and optimizer cannot lose each other."""

from __future__ import annotations

from numbers import Number
from typing import Any

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from normuon_plugins.core.build import build_normuon

# Where Accelerate makes flat shards or takes the step over, unless it is FSDP2, which makes DTensors.
FOREIGN_SHARDING = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
# Where every process holds the whole model and DDP makes the gradients equal.
REPLICATING = (DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.MULTI_XPU)


def prepare_normuon(accelerator: Accelerator, model: nn.Module, *others: Any, **options: Any) -> tuple[Any, ...]:
    """Build NorMuon for ``model`` and prepare everything.

    Args:
        accelerator: The run's accelerator: one process, DDP (whose processes then share the work) or FSDP2.
        model: The model, not yet prepared.
        *others: Whatever else ``accelerator.prepare`` takes: data loaders. A scheduler needs the optimizer first:
            build it on the returned one and call ``accelerator.prepare(scheduler)``.
        **options: See ``build_normuon``: ``lr``, ``weight_decay``, ``overrides``, ...

    Returns:
        ``(model, optimizer, *others)``, prepared: what ``accelerator.prepare(model, optimizer, *others)`` returns.

    Raises:
        ValueError: If the accelerator shards parameters in another way than FSDP2, the model is already prepared, or
            see ``build_normuon``.
        TypeError: If an option is not known, or a number, an optimizer or a scheduler stands among ``others``.

    Example:
        model, optimizer, loader = prepare_normuon(accelerator, model, loader, lr=3e-4, weight_decay=0.1)
    """
    if accelerator.distributed_type in FOREIGN_SHARDING and not accelerator.is_fsdp2:
        raise ValueError(
            f"prepare_normuon runs in one process, under DDP or FSDP2; this accelerator's distributed_type is"
            f" {accelerator.distributed_type.value}. Use FullyShardedDataParallelPlugin(fsdp_version=2)."
        )
    if getattr(model, "_is_accelerate_prepared", False):
        raise ValueError("the model is already prepared; give prepare_normuon the model itself, before prepare().")
    misplaced = [other for other in others if isinstance(other, (Number, Optimizer, LRScheduler))]
    if misplaced:
        raise TypeError(
            f"prepare_normuon takes data loaders after the model, not a {type(misplaced[0]).__name__}."
            " Options go in by name (lr=...), a scheduler is built on the returned optimizer."
        )
    if accelerator.distributed_type in REPLICATING and accelerator.parallelism_config is None:
        options.setdefault("process_group", dist.group.WORLD)
    optimizer = build_normuon(model, **options)
    prepared: tuple[Any, ...] = accelerator.prepare(model, optimizer, *others)
    return prepared
