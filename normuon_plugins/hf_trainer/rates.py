"""The second learning rate in the Trainer's own log entries."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from normuon_plugins.core.wrappers import find_normuon

KEY = "adamw_learning_rate"


class AdamWLearningRate(TrainerCallback):  # type: ignore[misc]  # mypy does not follow transformers
    """Adds ``adamw_learning_rate`` wherever the Trainer logs ``learning_rate``, which is that of the matrices.

    ``register_normuon`` puts it among the Trainer's default callbacks, in front of those that report, so that every
    reporter sees it. It does nothing for another optimizer, or where nothing is on AdamW.
    """

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **references: Any,
    ) -> None:
        """Add the rate to what is reported and to ``log_history``, which holds a copy made before."""
        optimizer = find_normuon(references.get("optimizer"))
        if optimizer is None or logs is None or "learning_rate" not in logs:
            return
        rate = optimizer.rates().get("adamw/lr")
        if rate is not None:
            logs[KEY] = state.log_history[-1][KEY] = float(rate)
