"""The step of matrix parameters: to the owners, through the mathematics, and back to where the parameters lie.

``update_rules`` holds the mathematics and knows no process group; ``Exchange`` moves tensors and knows no update rule.
They meet here.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from normuon_plugins.core.layout import Layout
from normuon_plugins.core.metrics import NeuronRecord
from normuon_plugins.core.orthogonalize import orthogonalize
from normuon_plugins.core.stacks import Stack
from normuon_plugins.core.step_plan import Team
from normuon_plugins.core.team_plan import Bucket
from normuon_plugins.core.update_rules import nesterov_update, normuon_direction, update_momentum
from normuon_plugins.distributed.exchange import Cut, Pending

# The fields of an exchanged item: the update on the way out and the direction on the way back, and the neuron state.
UPDATE, NEURONS = 0, 1

Orthogonalize = Callable[[Tensor], Tensor]


@dataclass
class StoredMatrix:
    """A matrix parameter on this rank during one step.

    Attributes:
        weight: This rank's block.
        momentum_buffer: Shape of ``weight``.
        second_momentum_buffer: This rank's block of the neuron state.
        gradient: Shape of ``weight``; None where this rank has none.
        group: The parameter's group.
        layout: Its parsed layout.
        shapes: Global shapes of the parameter and of its neuron state.
    """

    weight: Tensor
    momentum_buffer: Tensor
    second_momentum_buffer: Tensor
    gradient: Tensor | None
    group: Mapping[str, Any]
    layout: Layout
    shapes: tuple[Sequence[int], Sequence[int]]

    def advance(self) -> None:
        """Bring the momentum up to date; a missing gradient counts as zero from here on."""
        if self.gradient is None:
            self.gradient = self.weight.new_zeros(()).expand(self.weight.shape)
        update_momentum(self.momentum_buffer, self.gradient, momentum=self.group["momentum"])

    def read(self, field: int, cut: Cut) -> Tensor:
        """Return a piece of what is to be orthogonalized (momentum or its Nesterov look-ahead), or of the neuron state.

        While it is open whether a missing gradient counts as zero, the piece is computed as if, and nothing is written.
        """
        if field == NEURONS:
            return cut(self.second_momentum_buffer)
        momentum, momentum_buffer = self.group["momentum"], cut(self.momentum_buffer)
        if self.gradient is None:
            return torch.mul(momentum_buffer, momentum**2 if self.group["nesterov"] else momentum)
        if self.group["nesterov"]:
            return nesterov_update(momentum_buffer, cut(self.gradient), momentum=momentum)
        return momentum_buffer

    def write(self, field: int, cut: Cut, value: Tensor) -> None:
        """Take a piece of the neuron state, or move: ``W <- (1 - lr * weight_decay) * W - lr * direction``."""
        if field == NEURONS:
            cut(self.second_momentum_buffer).copy_(value)
            return
        lr = self.group["lr"]
        weight, direction = cut(self.weight), value.to(self.weight.device)
        weight.mul_(1 - lr * self.group["weight_decay"])
        if isinstance(lr, Tensor):  # reading its value would synchronize a GPU
            weight.sub_(direction.to(weight.dtype) * lr)
        else:
            weight.add_(direction, alpha=-lr)


class Directions:
    """The mathematics of one step, and what it leaves for ``NorMuon.metrics``.

    Args:
        orthogonalize_fn: Replaces Newton-Schulz; None uses the group's options.

    Attributes:
        records: One per batch so far.
    """

    def __init__(self, orthogonalize_fn: Orthogonalize | None) -> None:
        self._orthogonalize_fn = orthogonalize_fn
        self.records: list[NeuronRecord] = []

    def __call__(self, update: Tensor, neurons: Tensor, stack: Stack, group: Mapping[str, Any]) -> Tensor:
        """Return the direction of one batch, with the options that all its matrices share."""
        found = normuon_direction(
            update,
            neurons,
            orthogonalize=self._orthogonalize_fn
            or partial(
                orthogonalize,
                ns_coefficients=group["ns_coefficients"],
                ns_steps=group["ns_steps"],
                ns_dtype=stack.dtype,
            ),
            normalize=group["normalize_neurons"],
            beta2=group["beta2"],
            eps=group["eps"],
            adjust_lr_fn=group["adjust_lr_fn"],
        )
        self.records.append(NeuronRecord.of(found, group["lr"]))
        return found.direction


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
        update = torch.empty(count, rows, cols, dtype=stack.dtype, device=stack.device)
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
