"""The time of a training step under every method, interleaved in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from evidence.methods import Method, make_optimizer
from evidence.training import Run, decoder, load_tokens, pick_device, training_examples

REPETITIONS = 15
WARMUP_STEPS = 2


def time_steps(methods: Sequence[Method], base: Run, cache: Path) -> dict[str, dict[str, list[float]]]:
    """Return the seconds of every timed ``step`` (forward, backward, optimizer) and of its ``optimizer`` part.

    The methods take turns, so that a machine that slows down slows all of them.
    """
    device = pick_device()
    run = replace(base, steps=REPETITIONS + WARMUP_STEPS)
    batches = training_examples(load_tokens(cache / run.text), run.size, run.seed).to(device)
    trained = []
    for method in methods:
        model = decoder(run.size, run.seed).to(device)
        trained.append((model, make_optimizer(model, method, lr=1e-4, adamw_lr=1e-4, weight_decay=0.1)))
    seconds: dict[str, dict[str, list[float]]] = {method.name: {"step": [], "optimizer": []} for method in methods}
    for number, batch in enumerate(batches):
        for method, (model, optimizer) in zip(methods, trained, strict=True):
            begin = _now(device)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=run.precision == "bfloat16"):
                loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            middle = _now(device)
            optimizer.step()
            end = _now(device)
            optimizer.zero_grad()
            if number >= WARMUP_STEPS:
                seconds[method.name]["step"].append(end - begin)
                seconds[method.name]["optimizer"].append(end - middle)
    return seconds


def step_ratios(seconds: dict[str, dict[str, list[float]]], reference: str) -> dict[str, float]:
    """Return the median over turns of a method's step by that of ``reference`` in the same turn."""
    return {
        name: statistics.median(
            ours / theirs for ours, theirs in zip(times["step"], seconds[reference]["step"], strict=True)
        )
        for name, times in seconds.items()
    }


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
