"""The optimizer inside what a framework hands around."""

from __future__ import annotations

from typing import Any

from normuon_plugins.core.optimizer import NorMuon


def find_normuon(optimizer: Any) -> NorMuon | None:
    """Return the NorMuon inside the wrappers of a framework, which keep it as ``.optimizer``, or None.

    The innermost: Fabric's wrapper is a NorMuon by its class, too, and the hooks that run are those of the one inside.
    """
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer if isinstance(optimizer, NorMuon) else None
