"""A callback that writes ``optimizer.metrics()`` to the loggers of the Trainer."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from normuon_plugins.core.optimizer import NorMuon


class NorMuonMetrics(Callback):  # type: ignore[misc]  # mypy does not follow lightning
    """Log ``NorMuon.metrics`` every ``log_every_n_steps`` optimizer steps, to every logger that the Trainer has.

    All ranks take part in one small collective, rank zero writes. The step in the log is that of ``self.log``, where a
    batch takes one step. Without
    a logger nothing is written. Keys end with ``-0``, ``-1``, ... where a module has several NorMuon optimizers.

    Raises:
        ValueError: When training starts without a NorMuon.

    Example:
        Trainer(callbacks=[NorMuonMetrics(), LearningRateMonitor("step")])
    """

    def __init__(self) -> None:
        self._seen_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the optimizer, and where a resumed run goes on."""
        if not _normuons(trainer):
            kinds = sorted({type(optimizer).__name__ for optimizer in trainer.optimizers})
            raise ValueError(f"NorMuonMetrics found no NorMuon among the optimizers: {kinds}; leave the callback out.")
        self._seen_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the metrics if this batch completed a step that is due."""
        seen, self._seen_step = self._seen_step, trainer.global_step
        if not _is_due(trainer, seen, trainer.global_step):
            return
        optimizers = _normuons(trainer)
        metrics: dict[str, float] = {}
        for index, optimizer in enumerate(optimizers):
            found = optimizer.metrics(synchronize=True)
            suffix = f"-{index}" if len(optimizers) > 1 else ""
            metrics |= {f"{key}{suffix}": float(value) for key, value in found.items()}
        for logger in trainer.loggers:
            # global_step counts this step already; self.log writes the number of steps before it
            logger.log_metrics(metrics, step=trainer.global_step - 1)


def _is_due(trainer: Trainer, seen: int, step: int) -> bool:
    """Return whether a multiple of ``log_every_n_steps`` lies in ``(seen, step]``; several optimizers skip numbers."""
    every = trainer.log_every_n_steps
    return bool(every) and step // every > seen // every


def _normuons(trainer: Trainer) -> list[NorMuon]:
    return [optimizer for optimizer in trainer.optimizers if isinstance(optimizer, NorMuon)]
