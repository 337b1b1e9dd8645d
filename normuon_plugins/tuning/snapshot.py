"""A model as it was: everything that training changes, remembered and put back."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from normuon_plugins.distributed.placement import local


class Snapshot:
    """Weights and buffers of a model, as copies in the CPU's memory, and what else training changes of it.

    Of sharded parameters (DTensors) each rank keeps its own block. Parameters that are frozen are not copied: nothing
    writes to them.

    Args:
        model: Any module; not modified.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module) -> None:
        self.model = model
        _reshard(model)
        self.parameters = list(model.parameters())
        self.requires_grad = [parameter.requires_grad for parameter in self.parameters]
        self.gradients = [parameter.grad for parameter in self.parameters]
        self.weights = [
            (parameter, local(parameter).to("cpu", copy=True))
            for parameter in self.parameters
            if parameter.requires_grad
        ]
        self.buffers = [
            (module, name, buffer, local(buffer).to("cpu", copy=True))
            for module in model.modules()
            for name, buffer in module.named_buffers(recurse=False)
        ]
        self.modes = [(module, module.training) for module in model.modules()]

    @torch.no_grad()
    def rewind(self) -> None:
        """Write the weights and buffers back, bit for bit, and leave no gradient: where every trial starts."""
        _reshard(self.model)
        for parameter, weight in self.weights:
            local(parameter).copy_(weight)
        for module, name, buffer, content in self.buffers:
            local(buffer).copy_(content)
            setattr(module, name, buffer)  # some modules put a new tensor in its place
        for parameter in self.parameters:
            parameter.grad = None

    def restore(self) -> None:
        """Rewind, and put back the gradients, the modes and ``requires_grad`` that the user's model had."""
        self.rewind()
        for module, mode in self.modes:
            module.training = mode
        for parameter, flag, gradient in zip(self.parameters, self.requires_grad, self.gradients, strict=True):
            parameter.requires_grad_(flag)
            parameter.grad = gradient


@contextmanager
def unchanged(model: nn.Module) -> Iterator[Snapshot]:
    """Lend a model: whatever happens inside, an exception or Ctrl-C too, it ends as it began, and so do random states.

    The random states are those of torch (the CPU and the model's devices), Python and, if it is loaded, numpy.
    """
    numpy = sys.modules.get("numpy")
    states = random.getstate(), numpy and numpy.random.get_state()
    devices = {parameter.device for parameter in model.parameters()} - {torch.device("cpu"), torch.device("meta")}
    kinds = {device.type for device in devices}
    with torch.random.fork_rng(
        sorted({device.index or 0 for device in devices}), device_type=kinds.pop() if kinds else None
    ):
        snapshot = Snapshot(model)
        try:
            yield snapshot
        finally:
            snapshot.restore()
            random.setstate(states[0])
            if numpy:
                numpy.random.set_state(states[1])


def reseed(seed: int) -> None:
    """Set all random states whose values ``unchanged`` puts back."""
    torch.manual_seed(seed)
    random.seed(seed)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(seed % 2**32)


def _reshard(model: nn.Module) -> None:
    """Give back what FSDP2 gathered: after an evaluation its root keeps whole weights, which are not the parameters."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
