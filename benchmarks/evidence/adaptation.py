"""One run of fine-tuning a pretrained model: what it is, and what it measures."""

from __future__ import annotations

import math
import statistics
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import get_linear_schedule_with_warmup

from evidence.one_rate import make_optimizer
from evidence.pretrained_models import make_model, predict
from evidence.tasks import TASKS, Task
from evidence.training import WARMUP, descend, load_tokens, pick_device

EVALUATION_BATCH = 64


@dataclass(frozen=True)
class Adaptation:
    """Everything that decides a run's result; the ledger's key.

    Attributes:
        data: Name of the file of examples, which is that of their content.
        model: Name of a pretrained model, or its folder.
        task: Name of one of ``TASKS``.
        lora: Whether what is pretrained is frozen and has LoRA.
        method: Name of an optimizer, see ``one_rate``.
        lr: Peak learning rate of everything.
        steps: Optimizer steps.
        seed: Of the head, the factors of LoRA, the order of the examples and dropout.
        precision: ``"float32"`` or ``"bfloat16"`` (autocast).
    """

    data: str
    model: str
    task: str
    lora: bool
    method: str
    lr: float
    steps: int
    seed: int
    precision: str


def find_task(name: str) -> Task:
    """Return the task called ``name``."""
    return next(task for task in TASKS if task.name == name)


def adapt(run: Adaptation, cache: Path) -> dict[str, Any]:
    """Carry out ``run``; the examples lie in ``cache``. Return what ``train`` returned, and the ``trained`` numbers."""
    task, data = find_task(run.task), load_tokens(cache / run.data)
    model = make_model(run.model, task, run.seed, lora=run.lora).to(pick_device())
    # LoRA under lora="adamw" leaves no matrix to NorMuon: that is the method
    warnings.filterwarnings("ignore", message="every trainable matrix belongs to an adapter")
    result = train(model, make_optimizer(model, run.method, run.lr), run, data)
    return {**result, "trained": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)}


def train(model: nn.Module, optimizer: Optimizer, run: Adaptation, data: dict[str, Any]) -> dict[str, Any]:
    """Fine-tune as ``run`` says: warmup, then linearly to zero, gradients clipped.

    Args:
        model: By ``make_model``.
        optimizer: Of its parameters; its learning rate is the peak.
        run: The rest.
        data: What ``encoded`` wrote.

    Returns:
        Held-out ``loss`` and ``accuracy`` at the end, the ``training_loss`` of the last tenth, and the ``seconds``. A
        run whose loss is no longer finite ends there, and its loss is infinite.
    """
    task, device = find_task(run.task), next(model.parameters()).device
    schedule = get_linear_schedule_with_warmup(optimizer, max(1, round(WARMUP * run.steps)), run.steps)
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=run.precision == "bfloat16")
    losses: list[float] = []
    begin = time.perf_counter()
    model.train()
    torch.manual_seed(run.seed)  # dropout: whatever drew numbers before
    for rows in order_of_examples(_count(data["training"]), task.batch_size, run.steps, run.seed):
        with autocast:
            logits, labels = predict(model, task, _rows(data["training"], rows, device))
        loss = nn.functional.cross_entropy(logits.float(), labels)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        descend(loss, model, optimizer, schedule)
    with autocast:
        held_out_loss, accuracy = judge(model, task, data["held_out"])
    finite = math.isfinite(held_out_loss) and math.isfinite(losses[-1])
    return {
        "loss": held_out_loss if finite else math.inf,
        "accuracy": accuracy if finite else 0.0,
        "training_loss": statistics.fmean(losses[-max(1, run.steps // 10) :]),
        "seconds": round(time.perf_counter() - begin, 2),
    }


def order_of_examples(count: int, batch_size: int, steps: int, seed: int) -> Tensor:
    """Return the places of the examples of every step, shape ``(steps, batch_size)``: epochs shuffled by ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    epochs = [torch.randperm(count, generator=generator) for _ in range(math.ceil(steps * batch_size / count))]
    return torch.cat(epochs)[: steps * batch_size].view(steps, batch_size)


@torch.no_grad()
def judge(model: nn.Module, task: Task, examples: dict[str, Tensor]) -> tuple[float, float]:
    """Return the mean loss per prediction, and the share that is right."""
    model.eval()
    device, count = next(model.parameters()).device, _count(examples)
    batch_size = EVALUATION_BATCH
    if task.kind == "pairs":  # a text is told from the others of its batch: more or fewer would be another task
        batch_size = task.batch_size
        count -= count % batch_size
    sums = torch.zeros(3, dtype=torch.float64)
    for rows in torch.arange(count).split(batch_size):
        logits, labels = predict(model, task, _rows(examples, rows, device))
        loss = nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
        right = (logits.argmax(-1) == labels).sum()
        sums += torch.tensor([loss.item(), right.item(), len(labels)], dtype=torch.float64)
    return (sums[0] / sums[2]).item(), (sums[1] / sums[2]).item()


def _count(examples: dict[str, Tensor]) -> int:
    return len(next(iter(examples.values())))


def _rows(examples: dict[str, Tensor], rows: Tensor, device: torch.device) -> dict[str, Tensor]:
    return {name: tensor[rows].to(device) for name, tensor in examples.items()}
