"""What the Trainer calls with the whole model, and what it hands around afterwards."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.integrations import deepspeed_config

from normuon_plugins.core.build import build_normuon
from normuon_plugins.core.group_options import is_flat_shard
from normuon_plugins.core.optimizer import NorMuon


class NorMuonFactory:
    """A factory in the Trainer's sense, since NorMuon plans its own groups."""

    def __call__(self, model: nn.Module, **options: Any) -> NorMuon:
        """Return ``build_normuon(model, **options)``; whole parameters on several processes share the work.

        The Trainer averages the gradients of whole parameters over all processes (DDP).

        Raises:
            ValueError: Under DeepSpeed or FSDP1, which hide the matrices; or see ``build_normuon``.
        """
        _refuse_flat_shards(model)
        if dist.is_initialized() and not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
            options.setdefault("process_group", dist.group.WORLD)
        return build_normuon(model, **options)


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
