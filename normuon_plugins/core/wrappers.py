"""The optimizer inside what a framework hands around, and the wrapper that averages its gradients."""

from __future__ import annotations

from typing import Any

from normuon_plugins.core.optimizer import NorMuon
from normuon_plugins.core.shared_work import SharedWork


def find_normuon(optimizer: Any) -> NorMuon | None:
    """Return the NorMuon inside the wrappers of a framework, which keep it as ``.optimizer``, or None.

    The innermost: Fabric's wrapper is a NorMuon by its class, too, and the hooks that run are those of the one inside.
    """
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer if isinstance(optimizer, NorMuon) else None


def follow_averaging(optimizer: NorMuon, wrapped: object) -> None:
    """Let the optimizer ask the DistributedDataParallel in ``wrapped``, if any, whether gradients are averaged.

    Where they are not in a step (``no_sync``, ``Join``, local SGD), every process then computes by itself.
    """
    optimizer._shared_work = SharedWork(wrapped)
