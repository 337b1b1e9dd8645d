"""Fabric: model and optimizer in one call, in the order that every strategy needs."""

from __future__ import annotations

from typing import Any

from lightning.fabric import Fabric
from torch import nn

from normuon_plugins.core.build import build_normuon
from normuon_plugins.core.wrappers import follow_averaging
from normuon_plugins.lightning.strategies import complete_options, refuse_flat_shards


def setup_normuon(fabric: Fabric, model: nn.Module, **options: Any) -> tuple[Any, Any]:
    """Set up ``model``, build NorMuon on the parameters that it has then, and set that up.

    ``fabric.setup(model, optimizer)`` takes an optimizer that was built before; ``ModelParallelStrategy`` puts other
    parameters into the model, and such an optimizer would train nothing (the first step refuses to).

    Args:
        fabric: Launched. In one process, under DDP (whose processes then share the work) or ModelParallelStrategy.
        model: The model, not yet set up.
        **options: See ``build_normuon``: ``lr``, ``weight_decay``, ``overrides``, ...

    Returns:
        ``(model, optimizer)`` as Fabric wraps them.

    Raises:
        ValueError: If the strategy hides the shapes of the parameters, the model is already set up, or see
            ``build_normuon``.
        TypeError: If an option is not known.

    Example:
        model, optimizer = setup_normuon(fabric, model, lr=3e-4, weight_decay=0.1)
    """
    refuse_flat_shards(fabric.strategy)
    wrapped = fabric.setup_module(model)
    options = complete_options(options, fabric.strategy, wrapped)
    # On the module inside: its names have no prefix of a wrapper, so overrides and checkpoints fit every strategy.
    optimizer = build_normuon(wrapped.module, **options)
    follow_averaging(optimizer, wrapped)
    return wrapped, fabric.setup_optimizers(optimizer)
