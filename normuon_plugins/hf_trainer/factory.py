"""What stands in the place of an optimizer class: the Trainer calls it with the whole model, others with groups."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch import nn
from transformers.integrations import deepspeed_config

from normuon_plugins.core.build import build_normuon
from normuon_plugins.core.build_from_groups import build_from_groups
from normuon_plugins.core.group_options import is_flat_shard
from normuon_plugins.core.optimizer import NorMuon
from normuon_plugins.hf_trainer.calling_trainer import averages_gradients, find_calling_trainer, groups_by_decay

# The names under which the Trainer takes groups, or another model, out of the options of an optimizer; the last counts.
GROUPS_IN_OPTIONS = ("params", "model", "optimizer_dict")


class NorMuonFactory:
    """A factory in the Trainer's sense, and a class in the sense of those who group parameters by themselves.

    ``NorMuonFactory()(model, **options)`` plans the model. ``NorMuonFactory(groups, **options)`` is an optimizer at
    once: it divides the groups by the plan of the model, and each keeps its own ``lr`` and ``weight_decay``.

    Args:
        params: Parameters, ``(name, parameter)`` pairs or groups (see ``planned_groups``), or a whole model.
        model: The one that holds the parameters. None takes that of the Trainer in whose method this is called;
            ``Trainer.get_optimizer_cls_and_kwargs(args, model)`` returns a factory that knows it.
        **options: Those of ``build_normuon``.

    Raises:
        ValueError: Under DeepSpeed or FSDP1, which hide the matrices; where no model is known; or see
            ``build_normuon`` and ``planned_groups``.
        TypeError: If there are options and no parameters; or see ``build_normuon``.
    """

    model: nn.Module | None

    def __new__(cls, params: Any = None, *, model: nn.Module | None = None, **options: Any) -> Any:
        """Return the factory; or, with parameters, the optimizer that it builds of them."""
        factory = super().__new__(cls)
        factory.model = model
        if params is not None:
            return _build(params, model, options)
        if options:
            raise TypeError(f"NorMuonFactory got {sorted(options)} and no parameters; give it a model or groups first.")
        return factory

    def __call__(self, model: nn.Module, /, **options: Any) -> NorMuon:
        """Return the optimizer of the trainable parameters of ``model``, or of the groups that the options hold.

        Sentence Transformers' trainers hand over groups of their loss, which holds the model, as ``optimizer_dict``.
        """
        others = [options.pop(name) for name in GROUPS_IN_OPTIONS if name in options]
        return _build(others[-1] if others else model, model if self.model is None else self.model, options)


def bind_model(model: nn.Module | None) -> Any:
    """Return ``NorMuonFactory`` as one that knows ``model``.

    No subclass that keeps it: classes are freed by the garbage collector alone, and the model with them.
    """
    if model is None:
        return NorMuonFactory

    @functools.wraps(NorMuonFactory, updated=())
    def bound(params: Any = None, **options: Any) -> Any:
        return NorMuonFactory(params, **{"model": model, **options})

    return bound


def _build(target: nn.Module | Iterable[Any], model: nn.Module | None, options: dict[str, Any]) -> NorMuon:
    """Build from ``target``, a model or groups; the latter are of ``model``."""
    trainer = find_calling_trainer()
    groups: Iterable[Any] | None
    if isinstance(target, nn.Module):
        options.setdefault("include_frozen", False)  # as the Trainer's own AdamW
        model, groups = target, groups_by_decay(trainer, target, options)
    else:
        groups = target
    if model is None and trainer is not None:
        model = trainer.model
    if model is None:
        raise ValueError(
            "NorMuonFactory got parameters, and knows no model to plan them by. Take the class from"
            " get_optimizer_cls_and_kwargs(args, model), or name it: NorMuonFactory(groups, model=model, ...)."
        )
    _refuse_flat_shards(model)
    if averages_gradients(trainer, model):
        options.setdefault("process_group", dist.group.WORLD)
    return build_normuon(model, **options) if groups is None else build_from_groups(model, groups, **options)


def _refuse_flat_shards(model: nn.Module) -> None:
    """Raise ``ValueError`` where the Trainer would train flat pieces; the remedy is in the Trainer's words."""
    if deepspeed_config() is not None:
        seen = "DeepSpeed flattens parameters and gradients"
    elif any(map(is_flat_shard, model.parameters())):
        seen = "FSDP version 1 flattens parameters"
    else:
        return
    raise ValueError(
        f"optim='normuon' needs whole matrices, and {seen}. Use FSDP2: TrainingArguments(fsdp=True,"
        " fsdp_config={'version': 2}), or fsdp_version: 2 in the configuration of accelerate launch; or another optim."
    )
