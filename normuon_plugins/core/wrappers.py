"""The optimizer inside what a framework hands around."""

from __future__ import annotations

from typing import Any

from normuon_plugins.core.optimizer import NorMuon


def find_normuon(optimizer: Any) -> NorMuon | None:
    """Return the NorMuon inside the wrappers of a framework, which keep it as ``.optimizer``, or None."""
    while optimizer is not None and not isinstance(optimizer, NorMuon):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer
