"""Build and prepare in one call, so that model and optimizer cannot lose each other."""

from __future__ import annotations

from numbers import Number
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from normuon_plugins.core.build import build_normuon

# Where Accelerate replaces the parameters by shards; everywhere else it moves or wraps the model and they stay whole.
SHARDING = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


def prepare_normuon(accelerator: Accelerator, model: nn.Module, *others: Any, **options: Any) -> tuple[Any, ...]:
    """Build NorMuon for ``model`` and prepare everything.

    Args:
        accelerator: The run's accelerator: one process or DDP.
        model: The model, not yet prepared.
        *others: Whatever else ``accelerator.prepare`` takes: data loaders. A scheduler needs the optimizer first:
            build it on the returned one and call ``accelerator.prepare(scheduler)``.
        **options: See ``build_normuon``: ``lr``, ``weight_decay``, ``overrides``, ...

    Returns:
        ``(model, optimizer, *others)``, prepared: what ``accelerator.prepare(model, optimizer, *others)`` returns.

    Raises:
        ValueError: If the accelerator shards parameters, the model is already prepared, or see ``build_normuon``.
        TypeError: If an option is not known, or a number, an optimizer or a scheduler stands among ``others``.

    Example:
        model, optimizer, loader = prepare_normuon(accelerator, model, loader, lr=3e-4, weight_decay=0.1)
    """
    if accelerator.distributed_type in SHARDING:
        raise ValueError(
            f"prepare_normuon runs in one process or under DDP; this accelerator's distributed_type is"
            f" {accelerator.distributed_type.value}."
        )
    if getattr(model, "_is_accelerate_prepared", False):
        raise ValueError("the model is already prepared; give prepare_normuon the model itself, before prepare().")
    misplaced = [other for other in others if isinstance(other, (Number, Optimizer, LRScheduler))]
    if misplaced:
        raise TypeError(
            f"prepare_normuon takes data loaders after the model, not a {type(misplaced[0]).__name__}."
            " Options go in by name (lr=...), a scheduler is built on the returned optimizer."
        )
    optimizer = build_normuon(model, **options)
    prepared: tuple[Any, ...] = accelerator.prepare(model, optimizer, *others)
    return prepared
