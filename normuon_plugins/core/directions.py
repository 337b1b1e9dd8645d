"""From updates to directions: the mathematics of one step, with the options of its groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from normuon_plugins.core.metrics import NeuronRecord, Rate
from normuon_plugins.core.orthogonalize import orthogonalize, without_autocast
from normuon_plugins.core.stacks import Stack
from normuon_plugins.core.step_size import MATCH_PROGRESS
from normuon_plugins.core.update_rules import Progress, Scale, normuon_direction, scale_neurons

Orthogonalize = Callable[[Tensor], Tensor]


class Directions:
    """The mathematics of one step, and what it leaves for ``NorMuon.metrics``.

    Args:
        orthogonalize_fn: Replaces Newton-Schulz; None uses the group's options.
        compile: Whether what follows it is fused by ``torch.compile``.

    Attributes:
        records: One per batch so far.
    """

    def __init__(self, orthogonalize_fn: Orthogonalize | None, *, compile: bool = False) -> None:
        self._orthogonalize_fn = orthogonalize_fn
        self._scale = _compiled() if compile else scale_neurons
        self.records: list[NeuronRecord] = []

    def __call__(
        self,
        update: Tensor,
        neurons: Tensor,
        stack: Stack,
        group: Mapping[str, Any],
        progress: Progress | None,
        rates: Sequence[Rate],
    ) -> Tensor:
        """Return the direction of one batch, with the options that all its matrices share, and the rates of each."""
        found = normuon_direction(
            update,
            neurons,
            orthogonalize=self._orthogonalizer(stack, group),
            normalize=group["normalize_neurons"],
            beta2=group["beta2"],
            eps=group["eps"],
            adjust_lr_fn=group["adjust_lr_fn"],
            scale=self._scale,
            progress=progress,
        )
        self.records.append(NeuronRecord.of(found, rates))
        return found.direction

    def _orthogonalizer(self, stack: Stack, group: Mapping[str, Any]) -> Orthogonalize:
        """Return the user's function, or Newton-Schulz, which leaves its result where the update was if it may."""
        keeps_update = group["adjust_lr_fn"] == MATCH_PROGRESS
        if self._orthogonalize_fn is not None:
            return partial(_call, self._orthogonalize_fn, keeps_update)
        options = {key: group[key] for key in ("ns_coefficients", "ns_steps")}
        return lambda update: orthogonalize(
            update, **options, ns_dtype=stack.dtype, out=None if keeps_update else update
        )


def _call(orthogonalize_fn: Orthogonalize, keeps_update: bool, update: Tensor) -> Tensor:
    """Call the user's function, in the dtype of the update also where a step is taken under autocast."""
    # The function may write to what it is given.
    given = update.clone(memory_format=torch.contiguous_format) if keeps_update else update.contiguous()
    with without_autocast(update.device):
        return orthogonalize_fn(given)


@cache
def _compiled() -> Scale:
    return torch.compile(scale_neurons)
