"""What ``configure_optimizers`` returns."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import LightningModule

from normuon_plugins.core.build import build_normuon, check_known
from normuon_plugins.core.optimizer import NorMuon
from normuon_plugins.core.wrappers import follow_averaging
from normuon_plugins.lightning.schedule import build_schedule
from normuon_plugins.lightning.strategies import complete_options


def configure_normuon(
    module: LightningModule, *, scheduler: str | None = None, warmup: int | float = 0, **options: Any
) -> NorMuon | dict[str, Any]:
    """Build NorMuon for a LightningModule, with a schedule over the whole run if asked for.

    Args:
        module: The module itself: ``return configure_normuon(self, lr=..., weight_decay=...)``.
        scheduler: ``"constant"``, ``"linear"`` or ``"cosine"``, stepped after every optimizer step, as long as the
            trainer's ``estimated_stepping_batches``; None for a fixed learning rate.
        warmup: Steps of linear warmup; below 1, the fraction of the run.
        **options: See ``build_normuon``: ``lr``, ``weight_decay``, ``overrides``, ...

    Returns:
        The optimizer, or Lightning's dict of optimizer and scheduler.

    Raises:
        ValueError: If the strategy hides the shapes of the parameters (FSDP1, DeepSpeed), the trainer does not know how
            long the run is, ``warmup`` is given without a scheduler, or see ``build_normuon``.
        TypeError: If ``module`` is no LightningModule, or an option is not known.
    """
    if not hasattr(
        module, "configure_optimizers"
    ):  # lightning.pytorch and pytorch_lightning each have a LightningModule
        raise TypeError(
            f"configure_normuon takes the LightningModule itself (self), not {type(module).__name__}; for one part of"
            " it, build_normuon(part, ...)."
        )
    check_known(options, "scheduler", "warmup")
    if scheduler is None and warmup:
        raise ValueError(f"warmup={warmup} needs a scheduler; scheduler='constant' keeps the rate after the warmup.")
    trainer = getattr(module, "_trainer", None)  # module.trainer raises where there is none yet
    strategy = None if trainer is None else trainer.strategy
    wrapped = getattr(strategy, "model", None)  # strategies wrap the model before they ask for its optimizers
    options = complete_options(options, strategy, wrapped)
    optimizer = build_normuon(module, **options)  # written so, jsonargparse finds NorMuon's options
    follow_averaging(optimizer, wrapped)
    if scheduler is None:
        return optimizer
    steps = module.trainer.estimated_stepping_batches
    if not 0 < steps < math.inf:
        raise ValueError(
            f"scheduler={scheduler!r} needs the length of the run, and the trainer estimates {steps} steps;"
            " set max_steps."
        )
    schedule = build_schedule(optimizer, scheduler, warmup=warmup, total_steps=int(steps))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step", "frequency": 1}}
