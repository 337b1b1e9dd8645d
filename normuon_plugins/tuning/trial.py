"""One trial: train from the same weights on the same batches with a pair of rates, and judge on held-out batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

from normuon_plugins.core.build import build_normuon
from normuon_plugins.distributed.agreement import gather_rows
from normuon_plugins.distributed.clipping import clip_grad_norm_
from normuon_plugins.tuning.batches import Batches, to_device
from normuon_plugins.tuning.snapshot import Snapshot, reseed

Loss = Callable[[Any, Any], Tensor]
SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class Task:
    """What all trials of a search have in common.

    Attributes:
        model: Trained in place, and rewound by ``snapshot`` before every trial.
        snapshot: Of ``model``.
        batches: Moved to the device of the model's first parameter, one at a time.
        loss: Takes the model and a batch, returns a scalar; None is ``model(**batch).loss``.
        schedule: One of ``SCHEDULES``: after the warmup, constant, or falling to zero on a line or a half cosine.
        warmup: Steps of linear warmup of a full run, as a part of which shorter ones take theirs; below 1, that part.
        max_grad_norm: Gradients are clipped to this norm; None leaves them.
        seed: Of dropout, and of the orders of the batches.
        options: Of ``build_normuon``, the rates excepted.
    """

    model: nn.Module
    snapshot: Snapshot
    batches: Batches
    loss: Loss | None
    schedule: str
    warmup: int | float
    max_grad_norm: float | None
    seed: int
    options: Mapping[str, Any]

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for a schedule that is not known."""
        if self.warmup < 0:
            raise ValueError(f"warmup={self.warmup!r} must be a number of steps, or a fraction of a run below 1.")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule={self.schedule!r} is not known; use one of {SCHEDULES}.")

    def run(self, rates: Mapping[str, float], steps: int, order: int = 0) -> float:
        """Train ``steps`` steps from the snapshot and return the held-out loss; infinity where it diverges.

        Args:
            rates: ``lr`` and, if it has a meaning here, ``adamw_lr``.
            steps: Optimizer steps, one batch each; the schedule is as long.
            order: Of the batches; 0 is the user's own.
        """
        self.snapshot.rewind()
        self.model.train()
        reseed(self.seed + order)
        optimizer = build_normuon(self.model, **{**self.options, **rates})
        scheduler = LambdaLR(optimizer, lambda step: self.factor(step, steps))
        training = self.batches.ordered(order, self.seed)
        for step in range(steps):
            loss = self._loss_of(training[step % len(training)])
            if not math.isfinite(self._agreed(loss)):
                return math.inf
            loss.backward()  # type: ignore[no-untyped-call]
            if self.max_grad_norm is not None:
                clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
            try:
                optimizer.step()
            except FloatingPointError:  # what nonfinite="raise" asks for
                return math.inf
            optimizer.zero_grad()
            scheduler.step()
        return self.judge()

    def judge(self) -> float:
        """Return the mean loss of the held-out batches, each counting the same; infinity where it is not finite."""
        self.model.eval()
        with torch.no_grad():
            losses = [self._agreed(self._loss_of(batch)) for batch in self.batches.held_out]
        mean = sum(losses) / len(losses)
        return mean if math.isfinite(mean) else math.inf

    def factor(self, step: int, steps: int) -> float:
        """Return what the rates are multiplied by at a step: never zero within the run, which is short."""
        part = self.warmup if self.warmup < 1 else self.warmup / self.batches.steps
        warmup = min(steps, math.ceil(part * steps))
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = (step - warmup) / max(1, steps - warmup)
        return {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 + 0.5 * math.cos(math.pi * progress)}[
            self.schedule
        ]

    def _loss_of(self, batch: Any) -> Tensor:
        device = next(self.model.parameters()).device
        moved = to_device(batch, device)
        if self.loss is not None:
            loss: Any = self.loss(self.model, moved)
        elif isinstance(batch, Mapping):
            loss = getattr(self.model(**moved), "loss", None)
            if loss is None:
                raise TypeError(
                    f"model(**batch) of {type(self.model).__name__} gives no .loss for a batch of {sorted(batch)}; a"
                    " Hugging Face model needs labels in the batch, any other model loss=function(model, batch)."
                )
        else:
            raise TypeError(f"a batch is a {type(batch).__name__}, not a dict; give loss=function(model, batch).")
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(f"the loss must be a tensor with one element, and is {shape}; return its mean.")
        return loss

    def _agreed(self, loss: Tensor) -> float:
        """Return the mean over the ranks that train this model together, so that all search the same way."""
        if not trains_together(self.model):
            return loss.item()
        rows = gather_rows(loss.detach().reshape(1))
        return sum(row[0] for row in rows) / len(rows)


def trains_together(model: nn.Module) -> bool:
    """Return whether other processes train the same model: a sharded one, or one wrapped for DDP."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    return any(isinstance(parameter, DTensor) for parameter in model.parameters()) or any(
        isinstance(module, DistributedDataParallel) for module in model.modules()
    )
