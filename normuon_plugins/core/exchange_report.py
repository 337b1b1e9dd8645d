"""What a step costs every rank, computed from shapes alone: no process, no mesh, no weight is needed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.distributed.tensor import Replicate, Shard

from normuon_plugins.core.buckets import DEFAULT_BUCKET_BYTES, is_local
from normuon_plugins.core.group_options import NS_DTYPES
from normuon_plugins.core.layout import parse_layout
from normuon_plugins.core.stacks import Stack, divide
from normuon_plugins.core.step_size import MATCH_PROGRESS
from normuon_plugins.core.team_plan import item_of, plan_buckets
from normuon_plugins.distributed.boxes import Box, shared
from normuon_plugins.distributed.placement import Blocks, companion_placements, locate_on_mesh


@dataclass(frozen=True)
class ExchangeReport:
    """Cost of one step of the matrix parameters, by rank.

    Attributes:
        multiplications: Of Newton-Schulz.
        bytes_sent: To other ranks.
        bytes_received: From other ranks.
        collectives: Of every rank alike.
        rounds: Buckets that travel.
        least_work: Multiplications that the busiest rank has in any division of whole matrices: no fewer than the
            mean, than the largest matrix, or than ``k + 1`` matrices where ``k`` on every rank leave one over.
    """

    multiplications: list[int]
    bytes_sent: list[int]
    bytes_received: list[int]
    collectives: int
    rounds: int
    least_work: float

    @property
    def imbalance(self) -> float:
        """Work of the busiest rank by the mean."""
        return max(self.multiplications) * len(self.multiplications) / max(1, sum(self.multiplications))

    @property
    def least_imbalance(self) -> float:
        """A bound of ``imbalance`` for any division of whole matrices."""
        return self.least_work * len(self.multiplications) / max(1, sum(self.multiplications))

    def __str__(self) -> str:
        ranks = len(self.multiplications)
        return (
            f"{ranks} ranks: {max(self.multiplications) / 1e12:.3g} T multiplications on the busiest,"
            f" {self.imbalance:.2f} times the mean (at least {self.least_imbalance:.2f});"
            f" at most {max(self.bytes_sent) / 2**20:.4g} MiB sent and {max(self.bytes_received) / 2**20:.4g} MiB"
            f" received in {self.collectives} collectives, {self.rounds} rounds"
        )


def plan_exchange(
    plan: Iterable[Any],
    *,
    shards: int,
    replicas: int = 1,
    shard_dim: int = 0,
    ns_dtype: str = "bfloat16",
    ns_steps: int = 5,
    ns_coefficients: str | Sequence[float] = "muon",
    bucket_bytes: int = DEFAULT_BUCKET_BYTES,
    adjust_lr_fn: str = MATCH_PROGRESS,
) -> ExchangeReport:
    """Return what a step costs every rank, before there are any.

    It plans with the functions that a step plans with, so the numbers are those that will be seen on a GPU. (A CPU
    computes half of each symmetric product and so takes fewer multiplications.)

    Args:
        plan: A ``ParameterPlan`` (of a model on the meta device, if it is large), or ``(shape, layout)`` pairs.
        shards: Ranks that hold the model once: FSDP2's world, or the shard dimension of HSDP; 1 for DDP.
        replicas: How many times they do: 1 for FSDP2, the replicate dimension of HSDP, the world of DDP.
        shard_dim: Dimension that is sharded; 0 is what ``fully_shard`` does.
        ns_dtype: As in ``NorMuon``.
        ns_steps: As in ``NorMuon``.
        ns_coefficients: As in ``NorMuon``.
        bucket_bytes: As in ``NorMuon``.
        adjust_lr_fn: As in ``build_normuon``: its default sends a few numbers more per matrix.

    Raises:
        ValueError: If there is no matrix, or a number of ranks is below one.

    Example:
        >>> report = plan_exchange([((8, 4), "o i")] * 6, shards=2)
        >>> report.multiplications, report.collectives
        ([4800, 4800], 2)
    """
    rows = [row if isinstance(row, tuple) else (row.shape, row.layout) for row in plan]
    matrices = [(tuple(shape), layout) for shape, layout in rows if layout is not None]
    if not matrices or shards < 1 or replicas < 1:
        raise ValueError(
            f"plan_exchange needs matrices and ranks; got {len(matrices)} matrices, shards={shards},"
            f" replicas={replicas}."
        )
    stacks: list[Stack] = []
    for number, (shape, spec) in enumerate(matrices):
        layout = parse_layout(spec)
        shapes = [shape, layout.neuron_state_shape(shape)]
        if adjust_lr_fn == MATCH_PROGRESS:
            shapes.append(layout.matrix_state_shape(shape))
        blocks = tuple(_locate(shape, each, shards, replicas, shard_dim) for each in shapes)
        stacks += divide(
            number,
            layout,
            shape,
            blocks,
            dtype=NS_DTYPES[ns_dtype],
            device=torch.device("meta"),
            ns_steps=ns_steps,
            ns_coefficients=ns_coefficients,
            options=(),
            bucket_bytes=bucket_bytes,
        )
    return _report(stacks, shards * replicas, bucket_bytes, note_bytes=len(rows) if shards > 1 else 0)


def _locate(shape: tuple[int, ...], companion: tuple[int, ...], shards: int, replicas: int, shard_dim: int) -> Blocks:
    """Return the blocks of a parameter of ``shape``, or of its neuron state, on a mesh ``(replicas, shards)``."""
    placements = companion_placements((Replicate(), Shard(shard_dim)), shape, companion, divided=False)
    return locate_on_mesh(companion, placements, (replicas, shards), tuple(range(shards * replicas)))


def _report(stacks: Sequence[Stack], ranks: int, bucket_bytes: int, note_bytes: int) -> ExchangeReport:
    """Add up what every stack costs its owner and its holders."""
    buckets = plan_buckets(stacks, ranks, 0, None, bucket_bytes, note_bytes=note_bytes)
    work, sent, received = ([0] * ranks for _ in range(3))
    for stack, owner in zip(stacks, buckets.owners, strict=True):
        work[owner] += stack.multiplications
        if is_local(stack, owner):
            continue
        item = item_of(stack, owner)
        for field in item.fields:
            sources = set(item.sources(field))
            for place, entries in enumerate(_entries(field.blocks, field.box)):
                size = entries * field.dtype.itemsize
                if place == owner or not size:
                    continue
                if field.returns:
                    sent[owner] += size
                    received[place] += size
                if place in sources:
                    sent[place] += size
                    received[owner] += size
    return ExchangeReport(
        work,
        sent,
        received,
        sum(bucket.exchange.collectives for bucket in buckets.rounds),
        len(buckets.rounds),
        _least_work(stacks, ranks),
    )


@lru_cache(maxsize=1024)  # the layers of a model ask for the same few
def _entries(blocks: Blocks, box: Box) -> tuple[int, ...]:
    """Return how many entries of ``box`` each rank holds."""
    return tuple(shared(held, box) for held in blocks.boxes)


def _least_work(stacks: Sequence[Stack], ranks: int) -> float:
    """Return a lower bound of the work of the busiest rank; see ``ExchangeReport.least_work``."""
    work = [stack.multiplications // stack.shape[0] for stack in stacks for _ in range(stack.shape[0])]
    work.sort(reverse=True)
    crowded = [(before // ranks + 1) * work[before] for before in range(0, len(work), ranks)]
    return max(sum(work) / ranks, *crowded)
