"""Bytes: what an optimizer keeps, and what a step takes on top."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile


def state_bytes(optimizer: Optimizer) -> int:
    """Return the bytes of all tensors in ``optimizer.state``, each counted once."""
    storages = {part.untyped_storage().data_ptr(): part for part in _tensors(optimizer.state)}
    return sum(part.untyped_storage().nbytes() for part in storages.values())


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the plain tensors inside ``value``: nested containers, and the parts of quantized tensors."""
    if isinstance(value, Tensor):
        if hasattr(value, "__tensor_flatten__"):
            for name in value.__tensor_flatten__()[0]:
                yield from _tensors(getattr(value, name))
        else:
            yield value
    elif isinstance(value, dict):
        for member in value.values():
            yield from _tensors(member)
    elif isinstance(value, (list, tuple)):
        for member in value:
            yield from _tensors(member)


def transient_bytes(step: Callable[[], Any], device: torch.device) -> int:
    """Return the most that was allocated during ``step`` over what was before."""
    if device.type != "cuda":
        return _profiled_peak(step)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _profiled_peak(step: Callable[[], Any]) -> int:
    """Return the largest sum of what torch's CPU allocator gave and did not get back while ``step`` ran."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak
