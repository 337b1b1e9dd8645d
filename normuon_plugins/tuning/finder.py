"""The search on a model: which run is next, how long it takes, and what all of them say."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from normuon_plugins.core.build import build_normuon, check_known
from normuon_plugins.distributed.placement import my_rank
from normuon_plugins.tuning.batches import collect
from normuon_plugins.tuning.grid import KNOBS, START, Point, Trial, rates_at
from normuon_plugins.tuning.reading import duration, number
from normuon_plugins.tuning.result import LearningRates
from normuon_plugins.tuning.search import Search
from normuon_plugins.tuning.snapshot import unchanged
from normuon_plugins.tuning.trial import Loss, Task

DEFAULT_BUDGET = 20
# Where the search begins if no rate is given: NorMuon's and torch.optim.Muon's own default.
DEFAULT_LR = 1e-3


def find_learning_rates(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss: Loss | None = None,
    validation: Iterable[Any] | None = None,
    lr: float | None = None,
    adamw_lr: float | None = None,
    steps: int | None = None,
    warmup: int | float = 0.1,
    schedule: str = "cosine",
    budget: int = DEFAULT_BUDGET,
    max_grad_norm: float | None = 1.0,
    seed: int = 0,
    progress: Callable[[str], object] | None = print,
    **options: Any,
) -> LearningRates:
    """Search for both learning rates with short runs on the user's own model and data.

    Runs of a quarter of the length find the order of magnitude, in factors of four. From the best of them, full runs
    follow each rate in factors of two until both neighbours are worse. The best pair is then compared with the one that
    was given, on other orders of the batches: a gain no larger than what the order does is not one.

    The model ends as it began, bit for bit, also after an exception or Ctrl-C: weights, buffers, gradients, modes,
    ``requires_grad``, and the random states of torch, Python and numpy. Trainable weights and buffers are copied to the
    CPU's memory once. Every run starts from the same weights, on the same batches in the same order, with one dropout.

    Args:
        model: Any module, in place on its device, sharded (FSDP2) or wrapped (DDP) if it will be trained so: then every
            rank calls this, with the same arguments and as many batches of its own.
        batches: Iterable of batches, such as a DataLoader; read once, and not further than needed. A dict goes into
            ``model(**batch)``, whose output has ``.loss`` (labels in the batch). Tensors go to the model's device.
        loss: ``loss(model, batch)`` returns a scalar tensor; for any other model, or to train under autocast.
        validation: Batches to judge by, all of them after every run; None holds out every 8th of ``batches``.
        lr: Rate of the hidden matrices that the user has: AdamW's, if NorMuon replaces it. None, where ``adamw_lr`` is
            None too, begins at 1e-3 with a wider search and compares with nothing.
        adamw_lr: Rate of everything else; None is ``lr``.
        steps: Optimizer steps of a full run, one batch each. None is one pass over the batches, 100 at most. Fewer
            batches than steps are used again, in the same order.
        warmup: Steps of linear warmup of a full run, and proportionally fewer of a shorter one; below 1, the fraction.
        schedule: ``"constant"``, ``"linear"`` or ``"cosine"`` (both fall to zero), over each run's own length.
        budget: Full runs that may be spent, 4 or more; four short ones count as one. It is kept.
        max_grad_norm: Gradients are clipped to this norm, as the Trainer does by default; None leaves them.
        seed: Of dropout, and of the other orders.
        progress: Called with a line before the first and after every run, on rank zero; None says nothing.
        **options: Of ``build_normuon``: ``weight_decay``, ``overrides``, ``lora``, ...

    Returns:
        The rates, every trial, and how to read them. A run whose loss is not finite counts as infinitely bad.

    Raises:
        TypeError: If ``batches`` is no iterable of batches, the model gives no loss, or an option is not known.
        ValueError: If there are too few batches, an argument is out of range, or the loss is not finite at the start.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
        >>> batches = [torch.randn(8, 4) for _ in range(16)]
        >>> found = find_learning_rates(
        ...     model, batches, loss=lambda model, x: (model(x).squeeze() - x.sum(1)).square().mean(), progress=None
        ... )
        >>> len(found.trials) > 4
        True
    """
    check_known(options, *inspect.signature(find_learning_rates).parameters)
    for name, rate in (("lr", lr), ("adamw_lr", adamw_lr)):
        if rate is not None and not 0 < rate < math.inf:
            raise ValueError(f"{name}={rate!r} must be above 0: it is where the search begins.")
    say = progress if progress is not None and my_rank() == 0 else lambda line: None
    has_start = lr is not None or adamw_lr is not None
    start = {"lr": lr or DEFAULT_LR, "adamw_lr": adamw_lr or lr or DEFAULT_LR}
    with unchanged(model) as snapshot:
        algorithms = {group["algorithm"] for group in build_normuon(model, **options).param_groups}
        knobs = KNOBS if "adamw" in algorithms else KNOBS[:1]
        data = collect(batches, validation, steps)
        task = Task(model, snapshot, data, loss, schedule, warmup, max_grad_norm, seed, options)
        search = Search(steps=data.steps, budget=budget, knobs=knobs, has_start=has_start)
        untrained = task.judge()
        if math.isinf(untrained):
            raise ValueError("the loss is not finite before the first step: look at the batches and the model.")
        say(
            f"At most {budget} runs of {data.steps} steps, or more and shorter ones: {budget * data.steps} steps."
            f" Loss before training: {number(untrained)}."
        )
        best, seconds = _spend(search, task, start, say)
    return LearningRates(
        best=rates_at(best, start, knobs),
        start=rates_at(START, start, knobs) if has_start else None,
        trials=[
            Trial(**rates_at(run.point, start, knobs), steps=run.steps, order=run.order, loss=found)
            for run, found in search.losses.items()
        ],
        steps=data.steps,
        budget=budget,
        open_ends=search.open_ends(best),
        untrained_loss=untrained,
        training_batches=len(data.training),
        held_out_batches=len(data.held_out),
        was_split=data.was_split,
        seconds=seconds,
        options=dict(options),
    )


def _spend(search: Search, task: Task, start: dict[str, float], say: Callable[[str], object]) -> tuple[Point, float]:
    """Do the runs that the search asks for; return its best point and the seconds that they took."""
    began = time.perf_counter()
    runs = search.runs()
    run = next(runs)
    while True:
        rates = rates_at(run.point, start, search.knobs)
        loss = task.run(rates, run.steps, run.order)
        shown = ", ".join(f"{name} {rate:g}" for name, rate in rates.items())
        again = f", order {run.order}" if run.order else ""
        say(f"run {len(search.losses) + 1}: {shown}, {run.steps} steps{again}: loss {number(loss)}")
        if not search.losses:
            seconds = (time.perf_counter() - began) / run.steps * search.allowed
            say(f"All runs together: about {duration(seconds)} at most.")
        try:
            run = runs.send(loss)
        except StopIteration as stop:
            return stop.value, time.perf_counter() - began
