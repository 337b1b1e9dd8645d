"""Build and prepare in one call, so that model and optimizer cannot lose each other."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from numbers import Number
from typing import Any

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType, fsdp2_canonicalize_names, get_int_from_env
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from normuon_plugins.core.build import build_normuon
from normuon_plugins.core.wrappers import follow_averaging

# Where Accelerate makes flat shards or takes the step over, unless it is FSDP2, which makes DTensors.
FOREIGN_SHARDING = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
# Where every process holds the whole model and DDP makes the gradients equal.
REPLICATING = (DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.MULTI_XPU)

ALONE = (
    "This process trains alone, on the whole model and all data; if it is one of several, start them with torchrun, on"
    " CPUs with Accelerator(cpu=True)."
)
# What stands among the loaders by mistake: options without their names, and what needs the optimizer first.
MISPLACED = (Number, str, Mapping, Tensor, Optimizer, LRScheduler)


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
        ValueError: If the accelerator shards parameters in another way than FSDP2, the model is already prepared or
            wrapped in DDP, or see ``build_normuon``.
        TypeError: If an option is not known, arguments stand in another order, or an option without its name, an
            optimizer or a scheduler stands among ``others``.

    Warns:
        UserWarning: If FSDP was asked for and Accelerate runs without it.

    Example:
        model, optimizer, loader = prepare_normuon(accelerator, model, loader, lr=3e-4, weight_decay=0.1)
    """
    _check_kinds(accelerator, model, others)
    _check_sharding(accelerator)
    _check_model(accelerator, model)
    if accelerator.distributed_type in REPLICATING and accelerator.parallelism_config is None:
        options.setdefault("process_group", dist.group.WORLD)
    optimizer = build_normuon(model, **options)
    prepared: tuple[Any, ...] = accelerator.prepare(model, optimizer, *others)
    follow_averaging(optimizer, prepared[0])
    if accelerator.is_fsdp2:
        _take_parameters_by_name(optimizer, prepared[0])
    return prepared


def _check_kinds(accelerator: Any, model: Any, others: tuple[Any, ...]) -> None:
    """Refuse arguments in another order, and options that were not given by name: they would be ignored."""
    if isinstance(accelerator, type) or not hasattr(accelerator, "distributed_type"):
        found = accelerator.__name__ + " itself" if isinstance(accelerator, type) else type(accelerator).__name__
        raise TypeError(f"prepare_normuon(accelerator, model, loader, lr=...) begins with an Accelerator, not {found}.")
    if not isinstance(model, nn.Module):
        raise TypeError(
            "prepare_normuon(accelerator, model, loader, lr=...) takes the model, an nn.Module, after the accelerator;"
            f" got {type(model).__name__}."
        )
    for other in others:
        if isinstance(other, MISPLACED):
            raise TypeError(
                f"prepare_normuon takes data loaders after the model, not {type(other).__name__}. Options go in by name"
                " (lr=..., or **options), a scheduler is built on the returned optimizer."
            )


def _check_sharding(accelerator: Accelerator) -> None:
    """Refuse what is no FSDP2, and say so where Accelerate shards nothing although it was told to."""
    kind = accelerator.distributed_type
    if kind in FOREIGN_SHARDING and not accelerator.is_fsdp2:
        name = "FSDP, version 1" if kind == DistributedType.FSDP else kind.value
        raise ValueError(
            f"prepare_normuon runs in one process, under DDP or FSDP2; this accelerator's distributed_type is {name}."
            " Use FullyShardedDataParallelPlugin(fsdp_version=2), or in the file of accelerate launch"
            " distributed_type: FSDP and, under fsdp_config, fsdp_version: 2."
        )
    # Accelerate drops a plugin that it does not use. This property still says that there was one; on XLA it means
    # something else.
    asked = accelerator.gradient_state.is_xla_gradients_synced and kind != DistributedType.XLA
    started = get_int_from_env(["WORLD_SIZE"], 1)  # as Accelerate itself asks the launcher
    if kind == DistributedType.NO and started > 1:
        warnings.warn(f"{started} processes were started, and this accelerator knows one. {ALONE}", stacklevel=3)
    elif asked and not accelerator.is_fsdp2 and accelerator.is_main_process:
        what = (
            ALONE
            if kind == DistributedType.NO
            else "Processes train as under DDP: the same weights, and all of the model in each."
        )
        warnings.warn(
            f"FSDP was asked for, but this accelerator shards nothing: its distributed_type is {kind.value}. Accelerate"
            f" shards on GPUs and their like, never on CPUs. {what}",
            stacklevel=3,
        )


def _check_model(accelerator: Accelerator, model: nn.Module) -> None:
    """Refuse a model that this accelerator has, in whatever it was wrapped since, and one that DDP wraps already.

    One that it had before ``free_memory()``, or that another one prepared, is prepared again, as Accelerate does.
    """
    mine = {id(p) for known in accelerator._models for p in known.parameters() if p.requires_grad}
    if any(id(p) in mine for p in model.parameters()):
        raise ValueError(
            "the model is already prepared; give prepare_normuon the model itself, before prepare(), and once: in place"
            " of accelerator.prepare(model, loader), call prepare_normuon(accelerator, model, loader, lr=...)."
        )
    if isinstance(model, DistributedDataParallel):
        raise ValueError("the model is wrapped in DistributedDataParallel, as Accelerate will do; give model.module.")


def _take_parameters_by_name(optimizer: Optimizer, model: nn.Module) -> None:
    """Put the sharded parameters into the groups by their names.

    Accelerate finds them by the addresses of the unsharded ones, and those on the meta device have one address, zero:
    under ``cpu_ram_efficient_loading`` a head that no checkpoint had is there on all ranks but the first, and each of
    its parameters would become the last of them.
    """
    parameters = fsdp2_canonicalize_names(dict(model.named_parameters()))
    for group in optimizer.param_groups:
        names = fsdp2_canonicalize_names(dict.fromkeys(group["param_names"]))
        group["params"] = [parameters[name] for name in names]
