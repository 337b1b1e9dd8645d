"""One training run: what it is, and what it measures."""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from corpus import Blocks
from settings import make_model
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_cosine_schedule_with_warmup

from evidence.methods import find_method, make_optimizer
from evidence.sizes import Size

# What is tuned of a run.
RATES = ("lr", "adamw_lr", "weight_decay")
WARMUP = 0.1
GRADIENT_NORM = 1.0
# Examples whose loss is the validation loss: the same for every run on a text.
VALIDATION_EXAMPLES = 64


@dataclass(frozen=True)
class Run:
    """Everything that decides a run's result; the ledger's key.

    Attributes:
        text: Name of the file of tokens, which is that of their content.
        width: As the five that follow, see ``Size``.
        method: Name of one of ``METHODS``.
        lr: Peak learning rate of the hidden matrices.
        adamw_lr: Peak learning rate of everything else.
        weight_decay: Of the hidden matrices.
        seed: Of the weights and of the order of the examples.
        evaluations: Validation losses along the way, the last one at the end.
        precision: ``"float32"`` or ``"bfloat16"`` (autocast).
    """

    text: str
    width: int
    layers: int
    vocabulary: int
    sequence_length: int
    batch_size: int
    steps: int
    method: str
    lr: float
    adamw_lr: float
    weight_decay: float
    seed: int
    evaluations: int = 1
    precision: str = "float32"

    @property
    def size(self) -> Size:
        """The model and its training."""
        return Size(self.width, self.layers, self.vocabulary, self.sequence_length, self.batch_size, self.steps)


@lru_cache(maxsize=4)
def load_tokens(file: Path) -> dict[str, Any]:
    """Return what ``corpus.tokenize`` wrote."""
    tokens: dict[str, Any] = torch.load(file)
    return tokens


def training_examples(tokens: dict[str, Any], size: Size, seed: int) -> Tensor:
    """Return the examples of every step, shape ``(steps, batch_size, sequence_length)``, epochs shuffled by ``seed``.

    Raises:
        ValueError: If the text is shorter than one example.
    """
    blocks = Blocks(tokens["training"], size.sequence_length).blocks
    generator = torch.Generator().manual_seed(seed)
    needed = size.steps * size.batch_size
    epochs = [torch.randperm(len(blocks), generator=generator) for _ in range(math.ceil(needed / len(blocks)))]
    return blocks[torch.cat(epochs)[:needed]].view(size.steps, size.batch_size, -1).long()


def validation_examples(tokens: dict[str, Any], size: Size) -> Tensor:
    """Return examples from all over the held-out documents, shape ``(count, sequence_length)``."""
    blocks = Blocks(tokens["validation"], size.sequence_length).blocks
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0))
    return blocks[order[:VALIDATION_EXAMPLES]].long()


def decoder(size: Size, seed: int) -> nn.Module:
    """Return the small Llama of the examples, its weights drawn from ``seed``."""
    arguments = argparse.Namespace(
        model=None, seed=seed, width=size.width, layers=size.layers, sequence_length=size.sequence_length
    )
    return make_model(arguments, size.vocabulary)


def pick_device() -> torch.device:
    """Return the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@torch.no_grad()
def evaluate(model: nn.Module, examples: Tensor, batch_size: int) -> float:
    """Return the mean loss per token."""
    losses = [model(input_ids=batch, labels=batch).loss * len(batch) for batch in examples.split(batch_size)]
    return (torch.stack(losses).sum() / len(examples)).item()


def descend(loss: Tensor, model: nn.Module, optimizer: Optimizer, schedule: LRScheduler) -> None:
    """Take one step: gradients of ``loss``, clipped; then the schedule's."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Tensor,
    validation: Tensor,
    *,
    evaluations: int,
    precision: str,
) -> dict[str, Any]:
    """Train on ``batches``, warmup then cosine to zero; return the validation losses by step.

    A run whose loss is no longer finite ends there; its losses are infinite from then on.
    """
    steps, device = len(batches), next(model.parameters()).device
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, round(WARMUP * steps)), steps)
    due = [round(steps * (number + 1) / evaluations) for number in range(evaluations)]
    losses: dict[str, float] = {}
    begin = time.perf_counter()
    for step, batch in enumerate(batches.to(device), start=1):
        with autocast:
            loss = model(input_ids=batch, labels=batch).loss
        if not math.isfinite(loss.item()):
            break
        descend(loss, model, optimizer, schedule)
        if step in due:
            with autocast:
                losses[str(step)] = evaluate(model, validation.to(device), batches.shape[1])
    finite = {str(step): losses.get(str(step), math.inf) for step in due}
    return {
        "losses": {step: loss if loss == loss else math.inf for step, loss in finite.items()},
        "seconds": round(time.perf_counter() - begin, 2),
    }


def train_model(run: Run, cache: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Carry out ``run``; the tokens lie in ``cache``. Return the model and what ``fit`` returned."""
    tokens = load_tokens(cache / run.text)
    model = decoder(run.size, run.seed).to(pick_device())
    optimizer = make_optimizer(
        model, find_method(run.method), lr=run.lr, adamw_lr=run.adamw_lr, weight_decay=run.weight_decay
    )
    batches, validation = training_examples(tokens, run.size, run.seed), validation_examples(tokens, run.size)
    return model, fit(model, optimizer, batches, validation, evaluations=run.evaluations, precision=run.precision)


def train(run: Run, cache: Path) -> dict[str, Any]:
    """Carry out ``run`` and return its losses."""
    return train_model(run, cache)[1]
