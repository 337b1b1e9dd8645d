"""One step of all parameters, in the order in which messages and multiplications overlap best."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from normuon_plugins.core.adamw_step import step_adamw
from normuon_plugins.core.compensation import COMPENSATION
from normuon_plugins.core.directions import Directions
from normuon_plugins.core.layout import parse_layout
from normuon_plugins.core.matrix_step import TeamStep, step_local
from normuon_plugins.core.metrics import NeuronRecord
from normuon_plugins.core.momentum import stored_momentum
from normuon_plugins.core.optimizer_state import MEAN_SQUARE_KEY
from normuon_plugins.core.step_plan import Member, StepPlan
from normuon_plugins.core.stored_matrix import StoredMatrix
from normuon_plugins.distributed.agreement import any_rank
from normuon_plugins.distributed.gradients import gradient_blocks, places_alike
from normuon_plugins.distributed.placement import local, my_rank


def local_gradients(plan: StepPlan, members: Sequence[Member]) -> dict[int, Tensor]:
    """Return this rank's block of every gradient that there is, by the parameter's number."""
    return gradient_blocks([member.parameter for member in members], plan.asked)


def find_nonfinite(plan: StepPlan, members: int, gradients: Mapping[int, Tensor]) -> tuple[list[int], bool]:
    """Return which of ``members`` parameters have a gradient with NaN or infinity on any rank that holds them.

    And whether any rank found one at all, also in a parameter that this rank holds nothing of: small teams are asked
    first and the larger ones told, so that all raise together. Ranks that share no parameter, even through others, are
    not asked: the stages of a pipeline have no team in common.
    """
    flags = _nonfinite_flags(members, gradients)
    found = any(flags)
    for team in plan.teams:
        *bad, found = any_rank([*(flags[number] for number in team.members), found], team.group, team.device)
        for number, is_bad in zip(team.members, bad, strict=True):
            flags[number] = is_bad
    return [number for number, is_bad in enumerate(flags) if is_bad], found


def others_in_words(plan: StepPlan) -> str:
    """Return a sentence about the ranks that no team of this rank reaches, and that hear of no error; "" for none."""
    if not dist.is_initialized():
        return ""
    told = {my_rank()}.union(*(dist.get_process_group_ranks(team.group) for team in plan.teams))
    others = [rank for rank in range(dist.get_world_size()) if rank not in told]
    more = f" and {len(others) - 8} more" if len(others) > 8 else ""
    words = f" Ranks {others[:8]}{more} share no matrix with this one and were not asked: end those that go on, too."
    return words if others else ""


def _nonfinite_flags(members: int, gradients: Mapping[int, Tensor]) -> list[bool]:
    """Return for each of ``members`` whether its gradient here has NaN or infinity.

    By its largest entry, which needs no copy of the gradient; all are read back at once, since asking each of them
    would stop a GPU once per parameter.
    """
    flags = [False] * members
    numbers = [number for number, gradient in gradients.items() if gradient.numel() > 0]
    # The largest entry of a complex tensor could be infinite where its parts are not.
    reals = [torch.view_as_real(each) if each.is_complex() else each for each in map(gradients.__getitem__, numbers)]
    asked: list[int] = []
    found: list[Tensor] = []
    for places in places_alike(reals):
        asked += places
        found.append(torch.stack(torch._foreach_norm([reals[place] for place in places], math.inf)).isfinite())
    if found:
        is_finite = torch.cat([each.to(found[0].device) for each in found]).tolist()
        for place, finite in zip(asked, is_finite, strict=True):
            flags[numbers[place]] = not finite
    return flags


def take_step(
    plan: StepPlan,
    members: Sequence[Member],
    gradients: Mapping[int, Tensor],
    states: Mapping[Tensor, Mapping[str, Tensor]],
    skipped: Container[int],
    options: Mapping[str, Any],
) -> list[NeuronRecord]:
    """Step every parameter that has a gradient on any rank; return what the neurons of this rank's matrices did.

    The first message leaves, then everything runs that needs none: AdamW, and matrices that lie whole on this rank.
    Then the rounds follow, each of them multiplied while the next one travels.

    Args:
        plan: What to do.
        members: The parameters that were planned, with their groups as they are now.
        gradients: See ``local_gradients``.
        states: Of every parameter of the plan.
        skipped: Numbers of parameters to leave alone, the same on every rank.
        options: ``orthogonalize_fn``, ``compile`` and ``bucket_bytes`` of the optimizer.
    """
    directions = Directions(options["orthogonalize_fn"], compile=options["compile"])
    step = _Step(plan, members, gradients, states, directions, options["bucket_bytes"])
    present = {number for number in gradients if number not in skipped}
    stepped = set(present)
    step.advance_exact_momenta(present)
    teams = [team for team in plan.teams if team.rounds]
    if not teams:
        step.step_here(present)
    for index, team in enumerate(teams):
        matrices = TeamStep(team, step.stored, directions)
        matrices.start(present)
        if index == 0:
            step.step_here(present)
        late = {number for number in matrices.find_gradients() if number not in present and number not in skipped}
        step.advance_exact_momenta(late)
        step.step_here(late)
        matrices.finish(present | late)
        stepped |= late
    step.advance_momenta(stepped)
    return directions.records


class _Step:
    """The parameters of a plan on this rank, during one step; see ``take_step`` for the arguments."""

    def __init__(
        self,
        plan: StepPlan,
        members: Sequence[Member],
        gradients: Mapping[int, Tensor],
        states: Mapping[Tensor, Mapping[str, Tensor]],
        directions: Directions,
        bucket_bytes: int,
    ) -> None:
        self._plan = plan
        self._members = members
        self._gradients = gradients
        self._states = [{key: local(state) for key, state in states[member.parameter].items()} for member in members]
        self._directions = directions
        self._bucket_bytes = bucket_bytes
        self.stored = {
            number: _stored(member, self._states[number], gradients.get(number))
            for number, member in enumerate(members)
            if member.group["algorithm"] == "normuon"
        }

    def advance_exact_momenta(self, numbers: Container[int]) -> None:
        """Bring the momenta of some matrix parameters up to date where that is done before they are read."""
        for number, matrix in self.stored.items():
            if number in numbers and matrix.is_exact:
                matrix.advance()

    def advance_momenta(self, numbers: Container[int]) -> None:
        """Bring the momenta of some matrix parameters up to date, after all were read."""
        for number, matrix in self.stored.items():
            if number in numbers:
                matrix.advance()

    def step_here(self, numbers: Container[int]) -> None:
        """Step those of some parameters that need no message; a missing gradient is zero."""
        others = [
            number
            for number, member in enumerate(self._members)
            if number in numbers and member.group["algorithm"] == "adamw"
        ]
        for _, same_group in groupby(others, key=lambda number: id(self._members[number].group)):
            self._step_adamw(list(same_group))
        for bucket in self._plan.local:
            step_local(bucket, self.stored, numbers, self._directions)

    def _step_adamw(self, numbers: list[int]) -> None:
        parameters = [local(self._members[number].parameter) for number in numbers]
        step_adamw(
            parameters,
            [
                self._gradients[number] if number in self._gradients else torch.zeros_like(parameter)
                for number, parameter in zip(numbers, parameters, strict=True)
            ],
            [self._states[number] for number in numbers],
            self._members[numbers[0]].group,
            self._bucket_bytes,
        )


def _stored(member: Member, state: Mapping[str, Tensor], gradient: Tensor | None) -> StoredMatrix:
    layout = parse_layout(member.group["layout"])
    shape = tuple(member.parameter.shape)
    weight = local(member.parameter)
    return StoredMatrix(
        weight,
        stored_momentum(state, layout),
        state["second_momentum_buffer"],
        weight.new_zeros(()).expand(weight.shape) if gradient is None else gradient,
        member.group,
        layout,
        (shape, layout.neuron_state_shape(shape), layout.matrix_state_shape(shape)),
        state.get(MEAN_SQUARE_KEY),
        state.get(COMPENSATION),
    )
