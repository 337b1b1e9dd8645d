"""A contender at work: its optimizer on weights and gradients that all contenders share."""

from __future__ import annotations

import torch
from contenders import Contender
from measure import seconds
from memory import state_bytes, transient_bytes
from shapes import Shape
from torch import Tensor, nn

# Small enough that nothing overflows in any number of steps; the time of a step depends on neither.
LR = 1e-3
WEIGHT_DECAY = 0.1


class Tensors:
    """Weights and gradients of one dtype, and a copy that restores them: several peers write to gradients.

    Args:
        shapes: Of the parameters.
        dtype: Of all of them.
        device: Where.
    """

    def __init__(self, shapes: tuple[Shape, ...], dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def draw(scale: float) -> list[Tensor]:
            return [torch.randn(shape, generator=generator, device=device).mul_(scale).to(dtype) for shape in shapes]

        self.device = device
        self.weights = draw(0.02)
        self.gradients = draw(1e-3)
        self._saved = [tensor.clone() for tensor in self.weights + self.gradients]

    def restore(self) -> None:
        """Write the first weights and gradients again."""
        torch._foreach_copy_(self.weights + self.gradients, self._saved)


class Entrant:
    """One contender with its optimizer.

    Args:
        contender: Who.
        tensors: The shared weights and gradients.
    """

    def __init__(self, contender: Contender, tensors: Tensors) -> None:
        self.contender = contender
        self.tensors = tensors
        self.gradients = _as_taken(tensors.gradients, contender)
        self.parameters = [nn.Parameter(weight) for weight in _as_taken(tensors.weights, contender)]
        self.optimizer = contender.build(self.parameters, LR, WEIGHT_DECAY)
        self._prepare()
        self.optimizer.step()  # creates the state; some peers compile
        self.state_bytes = state_bytes(self.optimizer)
        self._prepare()
        self.transient_bytes = transient_bytes(self.optimizer.step, tensors.device)

    @property
    def parameter_bytes(self) -> int:
        """Bytes of the parameters."""
        return sum(parameter.numel() * parameter.element_size() for parameter in self.parameters)

    def timed_step(self) -> float:
        """Take one step on restored weights and gradients; return its seconds."""
        self._prepare()
        return seconds(self.optimizer.step, self.tensors.device)

    def _prepare(self) -> None:
        self.tensors.restore()
        # HeavyBall takes the gradient away.
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient


def _as_taken(tensors: list[Tensor], contender: Contender) -> list[Tensor]:
    """Return the tensors themselves, or stacks as one view for each matrix where a contender takes no stacks."""
    if contender.takes_stacks:
        return tensors
    return [part for tensor in tensors for part in (tensor.unbind() if tensor.ndim == 3 else [tensor])]
