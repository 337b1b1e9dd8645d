"""The step of matrix parameters: to the owners, through the mathematics, and back to where the parameters lie.

``update_rules`` holds the mathematics and knows no process group; ``Exchange`` moves tensors and knows no update rule.
They meet here.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normuon_plugins.core.directions import Directions
from normuon_plugins.core.gradient_squares import sum_squares
from normuon_plugins.core.metrics import Rate
from normuon_plugins.core.stacks import SQUARES
from normuon_plugins.core.step_plan import Team
from normuon_plugins.core.step_size import largest_rms, spread, update_mean_square
from normuon_plugins.core.stored_matrix import StoredMatrix
from normuon_plugins.core.team_plan import Bucket
from normuon_plugins.core.update_rules import Progress
from normuon_plugins.distributed.boxes import length
from normuon_plugins.distributed.exchange import Cut
from normuon_plugins.distributed.message import Pending


class _Batch(NamedTuple):
    """Whole matrices of one shape, and their state.

    Attributes:
        items: Numbers of their stacks in the bucket.
        update: Shape ``(count, rows, cols)``.
        neurons: Shape ``(count, rows, 1)``, float32.
        mean_square: Of the gradients, shape ``(count, 1, 1)``, float32; None unless ``match_progress_adamw`` keeps it.
        squares: The ranks' parts of this step's, shape ``(ranks, count)``, float32; zero where there is none.
    """

    items: list[int]
    update: Tensor
    neurons: Tensor
    mean_square: Tensor | None = None
    squares: Tensor | None = None


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
        self._batches: list[_Batch] = []
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
        batch = _Batch(items, update, neurons)
        if len(stack.boxes) > SQUARES:
            ranks = max(length(self.bucket.stacks[item].boxes[SQUARES][0]) for item in items)
            squares = torch.zeros(ranks, count, dtype=torch.float32, device=stack.device)
            batch = _Batch(items, update, neurons, torch.empty_like(squares[0]).view(-1, 1, 1), squares)
        self._batches.append(batch)
        self._show(batch)

    def _show(self, batch: _Batch) -> None:
        """Make the parts of a batch known by item: what travels of each, in the order of its fields."""
        stacked = [tensor for tensor in (batch.update, batch.neurons, batch.mean_square) if tensor is not None]
        first = 0
        for item in batch.items:
            stack = self.bucket.stacks[item]
            here = slice(first, first + stack.shape[0])
            matrix = self.stored[stack.parameter]
            views = [
                matrix.layout.storage_view(tensor[here], shape)
                for tensor, shape in zip(stacked, matrix.shapes, strict=False)
            ]
            if batch.squares is not None:
                views.append(batch.squares[: length(stack.boxes[SQUARES][0]), here])
            self._views[item] = tuple(views)
            first = here.stop

    def whole(self, item: int, field: int) -> Tensor:
        """Return the update (later the direction) or a small state of an item that this rank owns."""
        return self._views[item][field]

    def read(self, item: int, field: int, cut: Cut) -> Tensor:
        """See ``StoredMatrix.read``; or add up the squares of what this rank holds of the gradients."""
        stack = self.bucket.stacks[item]
        matrix = self.stored[stack.parameter]
        if field == SQUARES:
            return cut(sum_squares(matrix.gradient, self.bucket.held[item], stack.boxes[0], stack.expert_dim))
        return matrix.read(field, cut)

    def write(self, item: int, field: int, cut: Cut, value: Tensor) -> None:
        """See ``StoredMatrix.write``."""
        self.stored[self.bucket.stacks[item].parameter].write(field, cut, value)

    def compute(self, directions: Directions) -> None:
        """Turn every update into its direction."""
        while self._batches:
            batch = self._batches.pop()
            stack = self.bucket.stacks[batch.items[0]]
            group = self.stored[stack.parameter].group
            stacks = [self.bucket.stacks[item] for item in batch.items]
            rates = [Rate(each.shape[0], self.stored[each.parameter].group["lr"]) for each in stacks]
            direction = directions(batch.update, batch.neurons, stack, group, self._progress(batch), rates)
            if direction is not batch.update:
                self._show(batch._replace(update=direction))

    def _progress(self, batch: _Batch) -> Progress | None:
        """Bring the mean squares up to date with what the ranks added up; return what ``scale_neurons`` needs."""
        if batch.mean_square is None or batch.squares is None:
            return None
        rows, cols = batch.update.shape[1:]
        mean_square = batch.squares.sum(0).div_(rows * cols).view(-1, 1, 1)
        update_mean_square(batch.mean_square, mean_square, momentum=self._option(batch, "momentum"))
        largest = largest_rms(self._option(batch, "lr"), rows, cols)
        if not isinstance(largest, Tensor):
            largest = batch.mean_square.new_full((1, 1, 1), largest)  # a number would be compiled into a kernel
        return Progress(batch.update, batch.mean_square, largest.expand_as(batch.mean_square))

    def _option(self, batch: _Batch, key: str) -> Any:
        """Return an option that groups may have of their own: one value, or a tensor of one per matrix."""
        stacks = [self.bucket.stacks[item] for item in batch.items]
        values = [self.stored[stack.parameter].group[key] for stack in stacks]
        if all(value is values[0] or (not isinstance(value, Tensor) and value == values[0]) for value in values):
            value = values[0]
            return value.to(batch.update.device, torch.float32).view(1, 1, 1) if isinstance(value, Tensor) else value
        counts = [stack.shape[0] for stack in stacks]
        return spread(zip(counts, values, strict=True), batch.neurons).view(-1, 1, 1)

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
        self._present: list[bool] = []

    def start(self, present: Container[int]) -> None:
        """Send the first round on its way, and with it which parameters have a gradient on this rank."""
        self._present = [number in present for number in self._team.members]
        self._send(0, self._note() if self._team.asks else None)

    def find_gradients(self) -> list[int]:
        """Return the numbers of the parameters that have a gradient on any rank.

        A rank with all gradients knows the answer, and waits for nothing.

        Raises:
            RuntimeError: See ``_read_notes``.
        """
        found = self._present
        if self._team.asks:
            assert self._outgoing is not None
            notes = self._read_notes(self._outgoing)
            found = found if notes is None else notes.any(dim=0).tolist()
        return [number for number, here in zip(self._team.members, found, strict=True) if here]

    def _read_notes(self, pending: Pending) -> Tensor | None:
        """Return who has a gradient, a row per rank and a column per parameter; None where this rank need not know.

        It must where it misses a gradient. On a CPU, where waiting costs nothing, all ranks look whether those that
        hold the same part of a parameter are alike; on a GPU the one without a gradient does.

        Raises:
            RuntimeError: If they are not: an owner among them would move all the others by no gradient.
        """
        looks = bool(self._team.copies) and self._team.device.type == "cpu"
        if all(self._present) and not looks:
            return None
        notes = pending.notes()
        if not notes:
            return None
        found = torch.stack(notes)[:, : len(self._present)].bool()
        self._check_copies(found)
        return found

    def _check_copies(self, notes: Tensor) -> None:
        """Raise where ranks that hold the same part differ; ``notes`` has a row per rank, a column per parameter."""
        for number, flags in zip(self._team.members, notes.mT.tolist(), strict=True):
            if number not in self._team.copies or all(flags) or not any(flags):
                continue
            name, blocks = self._team.copies[number]
            rows = list(zip(blocks.ranks, blocks.twins, flags, strict=True))
            having = {twin for _, twin, flag in rows if flag}
            lacking = [rank for rank, twin, flag in rows if not flag and twin in having]
            if lacking:
                present = [rank for rank, _, flag in rows if flag]
                raise RuntimeError(
                    f"{name!r} has a gradient on ranks {present} and none on ranks {lacking}, which"
                    " hold the same part of it and share the work of its step. Average the gradients first (DDP does,"
                    " outside no_sync), or let every replica compute its own step: replicas='redundant'."
                )

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
            note = self._note() if index == 0 and not self._team.asks else None
            for part in range(bucket.exchange.parts):
                returning()
                back = bucket.exchange.start_to_shards(part, visit.whole, visit.chosen, bucket.device, note)
                if note is not None:  # before anything is written
                    self._read_notes(back)
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
