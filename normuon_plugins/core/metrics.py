"""What the last step did, in numbers for a log: learning rates, the size of the update, how unequal the neurons are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normuon_plugins.core.step_size import spread
from normuon_plugins.core.update_rules import Direction
from normuon_plugins.distributed.agreement import gather_rows
from normuon_plugins.distributed.placement import compute_device

# What NeuronRecord.totals returns: so many sums, then so many largest values.
SUMS, MAXIMA = 4, 2


class Rate(NamedTuple):
    """The learning rate of so many matrices, one after the other: those of several groups may share a batch."""

    matrices: int
    lr: float | Tensor


class NeuronRecord(NamedTuple):
    """What is remembered of a batch of matrices until the next step: two values per neuron, no copy of a matrix.

    Attributes:
        rms: RMS of each row of the orthogonalized update, shape ``(batch, m, 1)``.
        scale: What each row was multiplied by, shape of ``rms``.
        cols: Length of a row.
        rates: Learning rates of the step.
    """

    rms: Tensor
    scale: Tensor
    cols: int
    rates: Sequence[Rate]

    @classmethod
    def of(cls, direction: Direction, rates: Sequence[Rate]) -> NeuronRecord:
        """Keep the small parts of ``direction``."""
        joined: list[Rate] = []
        for rate in rates:
            if joined and rate.lr is joined[-1].lr:
                joined[-1] = Rate(joined[-1].matrices + rate.matrices, rate.lr)
            else:
                joined.append(rate)
        frozen = [Rate(rate.matrices, _frozen(rate.lr)) for rate in joined]
        return cls(direction.rms, direction.scale, direction.direction.shape[-1], frozen)

    @property
    def counts(self) -> tuple[int, int, int]:
        """How many matrices, numbers and neurons there are; known without asking the device."""
        neurons = self.rms.numel()
        return self.rms.shape[0], neurons * self.cols, neurons

    def totals(self) -> Tensor:
        """Return what adds up over batches and ranks, shape ``(6,)``, float32, on the batch's device.

        ``SUMS`` sums: spreads before and after the neuron step, squares of the direction, rates. Then ``MAXIMA``
        largest values: of the rates, and of minus the rates.
        """
        before = self.rms.float().squeeze(-1)
        scale = self.scale.float().squeeze(-1)
        after = before * scale
        # A row of zeros stays zero whatever it is multiplied by, which is huge then: it has no rate.
        rates = (scale * spread(self.rates, scale).view(-1, 1)).masked_fill(before == 0, 0.0)
        squares = after.square().sum() * self.cols
        return torch.stack([_spread(before), _spread(after), squares, rates.sum(), rates.max(), -rates.min()])


def _spread(rms: Tensor) -> Tensor:
    """Return the sum over matrices of the standard deviation over the mean of their rows, from ``(matrices, rows)``."""
    mean = rms.mean(dim=1).clamp_min(torch.finfo(rms.dtype).tiny)
    return (rms.std(dim=1, correction=0) / mean).sum()


def first_rates(param_groups: Sequence[Mapping[str, Any]]) -> dict[str, float | Tensor]:
    """Return the learning rate of the first group of each algorithm."""
    rates: dict[str, float | Tensor] = {}
    for group in param_groups:
        if not group["params"]:
            continue  # everything of its kind is frozen
        rates.setdefault(f"{group['algorithm']}/lr", _frozen(group["lr"]))
    return rates


def _frozen(lr: float | Tensor) -> float | Tensor:
    """Return ``lr`` as it is now: a scheduler writes into a tensor."""
    return lr.clone() if isinstance(lr, Tensor) else lr


def share(param_groups: Sequence[Mapping[str, Any]]) -> float:
    """Return how many of the trainable numbers are on NorMuon, of 1."""
    sizes = {"normuon": 0, "adamw": 0}
    for group in param_groups:
        sizes[group["algorithm"]] += sum(p.numel() for p in group["params"] if p.requires_grad)
    return sizes["normuon"] / max(1, sum(sizes.values()))


def neuron_metrics(records: Sequence[NeuronRecord]) -> dict[str, Tensor]:
    """Return what the last step did to the neurons of the matrices that this rank computed, on their device."""
    return _describe(_count(records), _sum(records).unbind()) if records else {}


def synchronized_neuron_metrics(records: Sequence[NeuronRecord], parameter: Tensor) -> dict[str, float]:
    """Return what the last step did to the neurons of all matrices; every rank calls this.

    Args:
        records: Of the matrices that this rank computed.
        parameter: Any parameter; says on which device ranks talk.
    """
    device = compute_device(parameter)
    counts = torch.tensor(_count(records), dtype=torch.float32, device=device)
    totals = _sum(records).to(device) if records else torch.zeros(SUMS + MAXIMA, dtype=torch.float32, device=device)
    # Ranks without a matrix have no rate: their zeros would be the smallest.
    found = [row for row in gather_rows(torch.cat([counts, totals])) if row[0]]
    rows = torch.tensor(found, dtype=torch.float64, device="cpu")
    return _describe(rows[:, :3].sum(dim=0).tolist(), _merge(rows[:, 3:]).tolist()) if len(rows) else {}


def _count(records: Sequence[NeuronRecord]) -> tuple[int, int, int]:
    rows = [(0, 0, 0), *(record.counts for record in records)]
    matrices, numbers, neurons = map(sum, zip(*rows, strict=True))
    return matrices, numbers, neurons


def _sum(records: Sequence[NeuronRecord]) -> Tensor:
    device = records[0].rms.device
    return _merge(torch.stack([record.totals().to(device) for record in records]))


def _merge(rows: Tensor) -> Tensor:
    """Return one row of totals for several."""
    return torch.cat([rows[:, :SUMS].sum(dim=0), rows[:, SUMS:].amax(dim=0)])


def _describe(counts: Sequence[float], totals: Sequence[Any]) -> dict[str, Any]:
    matrices, numbers, neurons = counts
    before, after, squares, rates, largest, minus_smallest = totals
    return {
        "normuon/update_rms": (squares / numbers) ** 0.5,
        "normuon/neuron_lr_min": -minus_smallest,
        "normuon/neuron_lr_mean": rates / neurons,
        "normuon/neuron_lr_max": largest,
        "normuon/neuron_spread_before": before / matrices,
        "normuon/neuron_spread_after": after / matrices,
    }
