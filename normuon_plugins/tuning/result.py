"""What a search found: rates, every trial, a table, a picture, a file of numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from normuon_plugins.tuning import comparison
from normuon_plugins.tuning.grid import Trial
from normuon_plugins.tuning.reading import sentences, table
from normuon_plugins.tuning.recipe import lines_to_paste


@dataclass(frozen=True, kw_only=True)
class LearningRates:
    """What ``find_learning_rates`` found. ``print`` it for the table and the line to paste.

    Attributes:
        best: The rates of smallest loss, ``lr`` and ``adamw_lr``, at full length in the user's order of batches.
        start: The rates that the search was given; None if none were.
        trials: Every run, in the order in which they were done.
        steps: Of a full run.
        budget: Full runs that were allowed.
        open_ends: A rate, and 1 (above) or -1 (below): there no neighbour of the best was tried, the budget had ended.
        untrained_loss: Of the held-out batches, before training.
        training_batches: How many there were; runs longer than that used them again.
        held_out_batches: How many judged.
        was_split: Whether those were held out from the user's batches.
        seconds: That all runs took.
        options: Passed through to ``build_normuon``.
    """

    best: Mapping[str, float]
    start: Mapping[str, float] | None
    trials: Sequence[Trial]
    steps: int
    budget: int
    open_ends: Sequence[tuple[str, int]]
    untrained_loss: float
    training_batches: int
    held_out_batches: int
    was_split: bool
    seconds: float
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def recommended(self) -> Mapping[str, float]:
        """The best rates, or those of the start where the best ones gained no more than chance does."""
        return self.best if self.start is None or self.is_gain else self.start

    @property
    def lr(self) -> float:
        """The recommended learning rate of the hidden matrices."""
        return self.recommended["lr"]

    @property
    def adamw_lr(self) -> float | None:
        """The recommended learning rate of everything else; None where the model has nothing else."""
        return self.recommended.get("adamw_lr")

    @property
    def loss(self) -> float:
        """Held-out loss of the best rates, at full length."""
        return comparison.losses(self, self.best)[0]

    @property
    def gain(self) -> float | None:
        """By how much the best rates are better than the start, in units of the loss; None without a start.

        Measured on the orders of the batches that did not choose the best, where the budget had room for them.
        """
        return comparison.gain(self)

    @property
    def noise(self) -> float | None:
        """The largest difference between two orders of the batches at equal rates; None where none was repeated."""
        return comparison.noise(self)

    @property
    def is_gain(self) -> bool:
        """Whether the best rates beat the start in every order of the batches, by more than the noise on average."""
        return comparison.is_gain(self)

    def __str__(self) -> str:
        """Return the table, what it says, and the lines to paste."""
        return "\n".join([*table(self), "", *sentences(self), "", *lines_to_paste(self.recommended, self.options)])

    def draw(self, file: str | Path) -> Path:
        """Write a picture of the loss over both learning rates; return the file.

        Args:
            file: ``.png``, ``.svg``, ``.pdf`` or what else matplotlib writes. Folders are created.

        Raises:
            ImportError: If matplotlib is missing.
            ValueError: If matplotlib cannot write such a file.
        """
        from normuon_plugins.tuning.figures import draw

        return draw(self, Path(file))

    def save(self, file: str | Path) -> Path:
        """Write everything as JSON; return the file. Folders are created."""
        file = Path(file)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(self.to_dict(), indent=1) + "\n")
        return file

    def to_dict(self) -> dict[str, Any]:
        """Return everything in types that JSON has: a loss that is not finite is None, other options are text."""
        plain = (bool, int, float, str, type(None))
        return {
            "lr": self.lr,
            "adamw_lr": self.adamw_lr,
            "is_gain": self.is_gain,
            "gain": _finite(self.gain),
            "noise": self.noise,
            "loss": _finite(self.loss),
            **{name: value for name, value in vars(self).items() if name not in ("trials", "options")},
            "trials": [{**asdict(trial), "loss": _finite(trial.loss)} for trial in self.trials],
            "options": {
                name: value if isinstance(value, plain) else str(value) for name, value in self.options.items()
            },
        }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
