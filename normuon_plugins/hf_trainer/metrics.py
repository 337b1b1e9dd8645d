"""``NorMuon.metrics()`` through the Trainer's own loggers."""

from __future__ import annotations

from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from normuon_plugins.core.wrappers import find_normuon


class NorMuonMetrics(TrainerCallback):  # type: ignore[misc]  # mypy does not follow transformers
    """Logs ``optimizer.metrics(synchronize=True)`` at every logging step, on whatever ``report_to`` names.

    The numbers, learning rates included, are those of the step that the Trainer has just logged, and follow its entry
    in ``log_history``. Every process takes part in one collective per logging step.

    Args:
        trainer: The trainer that it is added to.

    Raises:
        TypeError: When training begins, if the trainer's optimizer is no NorMuon.

    Example:
        trainer.add_callback(NorMuonMetrics(trainer))
    """

    def __init__(self, trainer: Trainer) -> None:
        if not isinstance(trainer, Trainer):
            raise TypeError(
                f"NorMuonMetrics takes the trainer itself, not a {type(trainer).__name__}:"
                " trainer.add_callback(NorMuonMetrics(trainer))."
            )
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **references: Any
    ) -> None:
        """Refuse another optimizer before the first step."""
        optimizer = self.trainer.optimizer
        if find_normuon(optimizer) is None:
            inner = getattr(optimizer, "optimizer", optimizer)
            raise TypeError(
                f"NorMuonMetrics logs what NorMuon measures; the trainer's optimizer is {type(inner).__name__}."
                " Use TrainingArguments(optim='normuon'), or leave the callback out."
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **references: Any,
    ) -> None:
        """Log the metrics after the Trainer's own entry of a training step, on every process."""
        optimizer = find_normuon(self.trainer.optimizer)
        if optimizer is not None and logs is not None and "learning_rate" in logs:
            # Not self.trainer.log: TRL's trainers override it to add what they collected and to print samples, and
            # would do both twice.
            Trainer.log(self.trainer, optimizer.metrics(synchronize=True))
