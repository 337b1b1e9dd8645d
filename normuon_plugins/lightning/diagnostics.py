"""A callback that writes a report of the optimizer's matrices every k steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from normuon_plugins.diagnostics import watch


class NorMuonDiagnostics(Callback):  # type: ignore[misc]  # mypy does not follow lightning
    """Write ``step-000100.html`` and so on; see ``normuon_plugins.diagnostics.watch``.

    Every rank takes part, rank zero writes. A resumed run goes on counting.

    Args:
        every: Optimizer steps between reports.
        folder: Created when the first report is written; a relative one lies in the Trainer's ``default_root_dir``.
        **options: ``match``, ``per_parameter`` and ``suffix`` of ``watch``.

    Example:
        Trainer(callbacks=[NorMuonDiagnostics(every=1000, match=r"layers\\.(0|15|31)\\.")])
    """

    def __init__(self, *, every: int, folder: str | Path = "diagnostics", **options: Any) -> None:
        self._every, self._folder, self._options = every, Path(folder), options
        self._handles: list[Any] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hang on every optimizer; raises where one is no NorMuon."""
        folder = Path(trainer.default_root_dir) / self._folder
        several = len(trainer.optimizers) > 1
        for index, optimizer in enumerate(trainer.optimizers):
            place = folder / f"optimizer-{index}" if several else folder
            # with several optimizers global_step counts the steps of all
            taken = trainer.global_step // len(trainer.optimizers)
            self._handles.append(watch(optimizer, every=self._every, folder=place, first_step=taken, **self._options))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let go of the optimizers."""
        while self._handles:
            self._handles.pop().remove()
