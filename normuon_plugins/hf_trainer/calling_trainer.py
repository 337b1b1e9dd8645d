"""The Trainer in whose method an optimizer is built, and what it alone can say.

transformers tells a factory neither the trainer nor what a subclass of it overrides: ``create_optimizer`` asks
``self.get_decay_parameter_names`` for groups, and throws them away for a factory; ``get_optimizer_cls_and_kwargs`` is
static, and usually called without the model. But the trainer is the ``self`` of a caller, so it is looked up there.
Where nobody is found, the model has to be named, decay is that of the plan, and every process computes by itself.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import Trainer

from normuon_plugins.core.optimizer import NorMuon


def find_calling_trainer() -> Trainer | None:
    """Return the Trainer of the nearest of its methods that is running, or None."""
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer):
            return caller
        frame = frame.f_back
    return None


def averages_gradients(trainer: Trainer | None, model: nn.Module) -> bool:
    """Return whether ``trainer`` makes the gradients of all parameters of ``model`` equal on all processes: by DDP.

    Not where its Accelerator trains alone although there is a process group, nor for parameters that the trainer's own
    model does not have, such as those of a loss: DDP wraps the model alone.
    """
    if trainer is None or not dist.is_initialized():
        return False
    accelerator = trainer.accelerator
    is_ddp = str(accelerator.distributed_type.value).startswith("MULTI_")  # not FSDP, whose ignored modules are apart
    wrapped = {id(parameter) for parameter in trainer.model.parameters()}
    return (
        is_ddp
        and accelerator.num_processes == dist.get_world_size()
        and all(id(p) in wrapped and not isinstance(p, DTensor) for p in model.parameters())
    )


def groups_by_decay(trainer: Trainer | None, model: nn.Module, options: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Return groups for what ``get_decay_parameter_names`` of a Trainer subclass changes; None if it changes nothing.

    Only the difference to the stock Trainer counts: what that decays and the subclass does not is in a group without
    decay, what the subclass adds in one that decays by ``weight_decay``. The rest is left to the plan.

    Args:
        trainer: Or None.
        model: Whose trainable parameters are grouped, or all under ``include_frozen``.
        options: Those of ``build_normuon``.
    """
    if trainer is None or getattr(trainer.get_decay_parameter_names, "__func__", None) is (
        Trainer.get_decay_parameter_names
    ):
        return None
    stock = set(Trainer.get_decay_parameter_names(trainer, model))
    asked = set(trainer.get_decay_parameter_names(model))
    default = inspect.signature(NorMuon).parameters["weight_decay"].default
    rest: dict[str, Any] = {"params": []}
    spared: dict[str, Any] = {"params": [], "name": "no_decay", "weight_decay": 0.0}
    added: dict[str, Any] = {"params": [], "name": "decay", "weight_decay": options.get("weight_decay", default)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or options.get("include_frozen"):
            changed = (name in stock) != (name in asked)
            (rest if not changed else added if name in asked else spared)["params"].append(parameter)
    return [rest, spared, added] if spared["params"] or added["params"] else None
