"""Whether ranks that divide the matrices among them hold the same momenta and gradients: asked, not assumed.

An owner computes the direction of a matrix from its own numbers, for all replicas. Where these differ (local SGD, a
step inside ``no_sync``, a rank that skipped a step), one rank's gradient would move all. Every rank keeps its own
momentum, so a difference stays visible for many steps, and asking now and then finds it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from normuon_plugins.core.step_plan import Member, StepPlan, Team
from normuon_plugins.distributed.placement import local
from normuon_plugins.distributed.replicas import Averaging, first_difference

# Steps between two questions. Of a gradient that one rank alone had, a momentum of 0.95 still holds 0.6 by then.
STEPS_BETWEEN = 10


class SharedWork:
    """With whom a step is shared, asked at every step.

    Args:
        wrapped: A model with a DistributedDataParallel around it or in it, see ``Averaging``; None where nobody knows.
    """

    def __init__(self, wrapped: object = None) -> None:
        self._averaging = Averaging(wrapped)

    def options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options to plan this step by; without a group every process computes all, and waits for nobody."""
        alone = options["replicas"] == "redundant" or not self._averaging.is_on()
        group = None if alone else options["process_group"]
        return {**options, "process_group": group, "ignored": self._averaging.leaves_alone}

    def check(
        self,
        plan: StepPlan,
        members: Sequence[Member],
        gradients: Mapping[int, Tensor],
        states: Mapping[Tensor, Mapping[str, Any]],
    ) -> None:
        """Raise ``RuntimeError`` on every rank of a team whose replicas differ, naming the parameter; changes nothing.

        Costs one gather of two numbers per matrix, and reads gradient and momentum once.

        Args:
            plan: Of this step.
            members: Its parameters.
            gradients: This rank's blocks, by number; a missing one counts as zero.
            states: By parameter; may be empty.
        """
        for team in plan.teams:
            shared = [number for number in team.copies if members[number].group["algorithm"] == "normuon"]
            if team.rounds and shared:
                _check_team(team, shared, members, gradients, states)


def _check_team(
    team: Team,
    numbers: Sequence[int],
    members: Sequence[Member],
    gradients: Mapping[int, Tensor],
    states: Mapping[Tensor, Mapping[str, Any]],
) -> None:
    momenta = {
        number: local(states[members[number].parameter]["momentum_buffer"])
        for number in numbers
        if states.get(members[number].parameter)
    }
    kinds = (("gradient", gradients), ("momentum", momenta))
    norms = [_norm(blocks.get(number), team.device) for _, blocks in kinds for number in numbers]
    twins = [team.copies[number][1].twins for _ in kinds for number in numbers]
    found = first_difference(torch.stack(norms), twins, team.group)
    if found is not None:
        place, kind = found[1], kinds[found[0] // len(numbers)][0]
        name = members[numbers[found[0] % len(numbers)]].name
        ranks = torch.distributed.get_process_group_ranks(team.group)
        raise RuntimeError(
            f"{name!r} has another {kind} on rank {ranks[place]} than on rank {ranks[twins[found[0]][place]]}, and they"
            " share the work on it: one's gradient would move all. Nothing was changed in this step. If every process"
            " is meant to train on its own for a while (local SGD, no_sync, skipped steps), pass replicas='redundant';"
            " else find out why the gradients are not averaged."
        )


def _norm(block: Tensor | None, device: torch.device) -> Tensor:
    if block is None:
        return torch.zeros((), dtype=torch.float32, device=device)
    wide = block if block.is_floating_point() else block.float()  # int8 momentum: its codes
    norm: Tensor = torch.linalg.vector_norm(wide, dtype=torch.promote_types(wide.dtype, torch.float32))
    return norm.to(device, torch.float32)
