"""The step of matrix parameters: to the owners, through the mathematics, and back to where the parameters lie.

``update_rules`` holds the mathematics and knows no process group; ``Exchange`` moves tensors and knows no update rule.
They meet here.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from normuon_plugins.core.metrics import NeuronRecord
from normuon_plugins.core.orthogonalize import orthogonalize
from normuon_plugins.core.stacks import Stack
from normuon_plugins.core.step_plan import Team
from normuon_plugins.core.stored_matrix import StoredMatrix
from normuon_plugins.core.team_plan import Bucket
from normuon_plugins.core.update_rules import Scale, normuon_direction, scale_neurons
from normuon_plugins.distributed.exchange import Cut, Pending

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

    def __call__(self, update: Tensor, neurons: Tensor, stack: Stack, group: Mapping[str, Any]) -> Tensor:
        """Return the direction of one batch, with the options that all its matrices share."""
        found = normuon_direction(
            update,
            neurons,
            orthogonalize=self._orthogonalizer(stack, group),
            normalize=group["normalize_neurons"],
            beta2=group["beta2"],
            eps=group["eps"],
            adjust_lr_fn=group["adjust_lr_fn"],
            scale=self._scale,
        )
        self.records.append(NeuronRecord.of(found, group["lr"]))
        return found.direction

    def _orthogonalizer(self, stack: Stack, group: Mapping[str, Any]) -> Orthogonalize:
        """Return the user's function, or Newton-Schulz, which leaves its result where the update was."""
        if (orthogonalize_fn := self._orthogonalize_fn) is not None:
            return lambda update: orthogonalize_fn(update.contiguous())
        options = {key: group[key] for key in ("ns_coefficients", "ns_steps")}
        return lambda update: orthogonalize(update, **options, ns_dtype=stack.dtype, out=update)


@cache
def _compiled() -> Scale:
    return torch.compile(scale_neurons)


class _Visit:
    """One bucket during one step: the whole matrices of this rank, before and after the mathematics.

    Args:
        bucket: What is visited.
        stored: Matrix parameters by number.
        alive: Numbers of those that are stepped; the stacks of others are neither multiplied nor written.
    """

    def __init__(self, bucket: Bucket, stored: Mapping[int, StoredMatrix], alive: Container[int]) -> None:
        self.bucket = bucket
        self.stored = stored
        self.chosen = {item for item, stack in enumerate(bucket.stacks) if stack.parameter in alive}
        self._views: dict[int, tuple[Tensor, ...]] = {}
        self._batches: list[tuple[list[int], Tensor, Tensor]] = []
        for batch in bucket.batches:
            items = [item for item in batch if item in self.chosen]
            if items:
                self._allocate(items)

    def _allocate(self, items: list[int]) -> None:
        stack = self.bucket.stacks[items[0]]
        count = sum(self.bucket.stacks[item].shape[0] for item in items)
        rows, cols = stack.shape[1:]
        # As it is stored, so that nothing is turned on the way in and out.
        sides = (cols, rows) if stack.turned else (rows, cols)
        update = torch.empty(count, *sides, dtype=stack.dtype, device=stack.device)
        update = update.mT if stack.turned else update
        neurons = torch.empty(count, rows, 1, dtype=torch.float32, device=stack.device)
        self._batches.append((items, update, neurons))
        self._show(items, update, neurons)

    def _show(self, items: Sequence[int], matrices: Tensor, neurons: Tensor) -> None:
        """Make the parts of a batch known by item."""
        counts = [self.bucket.stacks[item].shape[0] for item in items]
        for item, *parts in zip(items, torch.split(matrices, counts), torch.split(neurons, counts), strict=True):
            matrix = self.stored[self.bucket.stacks[item].parameter]
            self._views[item] = tuple(
                matrix.layout.storage_view(part, shape) for part, shape in zip(parts, matrix.shapes, strict=True)
            )

    def whole(self, item: int, field: int) -> Tensor:
        """Return the update (later the direction) or the neuron state of an item that this rank owns."""
        return self._views[item][field]

    def read(self, item: int, field: int, cut: Cut) -> Tensor:
        """See ``StoredMatrix.read``."""
        return self.stored[self.bucket.stacks[item].parameter].read(field, cut)

    def write(self, item: int, field: int, cut: Cut, value: Tensor) -> None:
        """See ``StoredMatrix.write``."""
        self.stored[self.bucket.stacks[item].parameter].write(field, cut, value)

    def compute(self, directions: Directions) -> None:
        """Turn every update into its direction."""
        while self._batches:
            items, update, neurons = self._batches.pop()
            stack = self.bucket.stacks[items[0]]
            direction = directions(update, neurons, stack, self.stored[stack.parameter].group)
            if direction is not update:
                self._show(items, direction, neurons)

    def release(self) -> None:
        """Let go of the whole matrices."""
        self._views.clear()


def step_local(
    bucket: Bucket,
    stored: Mapping[int, StoredMatrix],
    alive: Container[int],
    directions: Directions,
) -> None:
    """Step the matrices of a bucket that needs no message; parameters that are not ``alive`` are left alone."""
    visit = _Visit(bucket, stored, alive)
    bucket.exchange.gather_own(visit.read, visit.whole, visit.chosen)
    visit.compute(directions)
    bucket.exchange.keep_own(visit.whole, visit.write, visit.chosen)


class TeamStep:
    """The step of what several ranks hold together: ``start``, then whatever needs no message, then ``finish``.

    Args:
        team: Its plan.
        stored: Its matrix parameters, by number.
        directions: The mathematics of this step.
    """

    def __init__(self, team: Team, stored: Mapping[int, StoredMatrix], directions: Directions) -> None:
        self._team = team
        self._stored = stored
        self._directions = directions
        self._outgoing: Pending | None = None

    def start(self, present: Container[int]) -> None:
        """Send the first round on its way, and with it which parameters have a gradient on this rank."""
        self._present = [number in present for number in self._team.members]
        self._send(0, self._note() if self._team.asks else None)

    def find_gradients(self) -> list[int]:
        """Return the numbers of the parameters that have a gradient on any rank.

        A rank with all gradients knows the answer, and waits for nothing.
        """
        found = self._present
        if self._team.asks and not all(found):
            assert self._outgoing is not None
            notes = torch.stack(self._outgoing.notes())[:, : len(found)]
            found = notes.any(dim=0).tolist()
        return [number for number, here in zip(self._team.members, found, strict=True) if here]

    def finish(self, alive: Container[int]) -> None:
        """Run all rounds: while one is multiplied the next one travels, and the one before travels back."""
        returning: Callable[[], None] = _nothing
        for index, bucket in enumerate(self._team.rounds):
            arriving = self._outgoing
            assert arriving is not None
            self._send(index + 1)
            visit = _Visit(bucket, self._stored, alive)
            bucket.exchange.finish_to_owners(arriving, visit.whole, visit.chosen)
            del arriving
            bucket.exchange.gather_own(visit.read, visit.whole, visit.chosen)
            visit.compute(self._directions)
            for part in range(bucket.exchange.parts):
                returning()
                back = bucket.exchange.start_to_shards(part, visit.whole, visit.chosen, bucket.device)
                returning = partial(bucket.exchange.finish_to_shards, back, visit.write, visit.chosen)
            bucket.exchange.keep_own(visit.whole, visit.write, visit.chosen)
            visit.release()
        returning()

    def _note(self) -> Tensor:
        """Return one byte per parameter: whether it has a gradient here. The usual answer is made on the device."""
        if all(self._present):
            return torch.ones(len(self._present), dtype=torch.uint8, device=self._team.device)
        return torch.tensor(self._present, dtype=torch.uint8, device=self._team.device)

    def _send(self, index: int, note: Tensor | None = None) -> None:
        """Start round ``index`` towards the owners, if there is one."""
        self._outgoing = None
        if index < len(self._team.rounds):
            bucket = self._team.rounds[index]
            visit = _Visit(bucket, self._stored, ())
            self._outgoing = bucket.exchange.start_to_owners(visit.read, bucket.device, note)


def _nothing() -> None:
    """Stand for the way back of the round before the first."""
