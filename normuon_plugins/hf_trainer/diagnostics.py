"""A callback that writes a report of the optimizer's matrices every k steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from normuon_plugins.diagnostics import watch


class NorMuonDiagnostics(TrainerCallback):  # type: ignore[misc]  # mypy does not follow transformers
    """Write ``step-000100.html`` and so on; see ``normuon_plugins.diagnostics.watch``.

    Every process takes part, the first writes. A resumed run goes on counting.

    Args:
        every: Optimizer steps between reports.
        folder: Created when the first report is written; a relative one lies in ``output_dir``.
        **options: ``match``, ``per_parameter`` and ``suffix`` of ``watch``.

    Example:
        trainer.add_callback(NorMuonDiagnostics(every=1000, match=r"layers\\.(0|15|31)\\."))
    """

    def __init__(self, *, every: int, folder: str | Path = "diagnostics", **options: Any) -> None:
        self._every, self._folder, self._options = every, Path(folder), options
        self._handle: Any = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **references: Any,
    ) -> None:
        """Hang on the optimizer; raises where it is no NorMuon."""
        folder = Path(args.output_dir) / self._folder
        self._handle = watch(optimizer, every=self._every, folder=folder, first_step=state.global_step, **self._options)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **references: Any
    ) -> None:
        """Let go of the optimizer."""
        self._handle.remove()
