"""The batches of a search: as many as are needed, in a list, some of them held out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

# Length of a full run where nobody says otherwise; fewer where there are fewer batches.
DEFAULT_STEPS = 100
# Of the user's batches, the first of every so many judges and does not train.
HELD_OUT_EVERY = 8


@dataclass(frozen=True)
class Batches:
    """What every trial trains on and is judged by.

    Attributes:
        training: In the user's order.
        held_out: Never trained on.
        was_split: Whether ``held_out`` was taken from the user's batches, in want of validation batches.
        steps: Of a full run; a run longer than ``training`` begins again at its front.
    """

    training: list[Any]
    held_out: list[Any]
    was_split: bool
    steps: int

    def ordered(self, order: int, seed: int) -> list[Any]:
        """Return the training batches in their own order (0), or in another one for every other number."""
        if order == 0:
            return self.training
        generator = torch.Generator("cpu").manual_seed(seed + order)
        places = torch.randperm(len(self.training), generator=generator, device="cpu")
        return [self.training[place] for place in places.tolist()]


def collect(batches: Iterable[Any], validation: Iterable[Any] | None, steps: int | None) -> Batches:
    """Take what a search needs from the user's batches, once and in order, so that an iterator may be given.

    Args:
        batches: Any iterable; no more than needed is taken from it.
        validation: All of it is kept; None holds out one batch of ``HELD_OUT_EVERY``.
        steps: Of a full run; None takes one pass over the training batches, at most ``DEFAULT_STEPS``.

    Raises:
        TypeError: If ``batches`` is no iterable of batches.
        ValueError: If there are too few, or ``steps`` is not a number of them.
    """
    for name, given in (("batches", batches), ("validation", validation)):
        if isinstance(given, (Mapping, Tensor, str)) or not (given is None or isinstance(given, Iterable)):
            raise TypeError(
                f"{name} must be several batches, such as a list or a DataLoader, not one {type(given).__name__}."
            )
    if steps is not None and steps < 1:
        raise ValueError(f"steps={steps!r} must be at least 1.")
    wanted = steps or DEFAULT_STEPS
    more = 0 if validation is not None else -(-wanted // (HELD_OUT_EVERY - 1))
    taken = list(islice(batches, wanted + more))
    least = 1 if validation is not None else 2
    if len(taken) < least:
        need = "one batch" if least == 1 else "two batches, one to train on and one to judge by,"
        raise ValueError(f"batches has {len(taken)}; give at least {need} and better a hundred. Was it used up before?")
    if validation is None:
        held_out = taken[::HELD_OUT_EVERY]
        del taken[::HELD_OUT_EVERY]
    else:
        held_out = list(validation)
        if not held_out:
            raise ValueError("validation has no batches; give some, or None to hold out some of batches.")
    return Batches(taken, held_out, validation is None, steps or min(wanted, len(taken)))


def to_device(batch: Any, device: torch.device) -> Any:
    """Return a batch with its tensors on ``device``, in the same mappings, lists and tuples.

    Example:
        >>> to_device({"x": torch.zeros(2), "name": "a"}, torch.device("meta"))["x"].device
        device(type='meta')
    """
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(to_device(value, device) for value in batch)
    return batch
