"""What a step does, decided once and kept until the parameters or their options change.

Every rank plans from the same facts (shapes, placements, options) and so arrives at the same plan without a message; a
digest of these facts is compared before the plan is used.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from normuon_plugins.core.compared_facts import Facts, compared_facts, options_in_words
from normuon_plugins.core.group_options import NS_DTYPES
from normuon_plugins.core.layout import parse_layout
from normuon_plugins.core.orthogonalize import fast_matmul_dtype
from normuon_plugins.core.stacks import Stack, divide
from normuon_plugins.core.step_size import MATCH_PROGRESS
from normuon_plugins.core.team_plan import Bucket, plan_buckets
from normuon_plugins.distributed.agreement import any_rank, check_equal, create_group
from normuon_plugins.distributed.gradients import is_elsewhere
from normuon_plugins.distributed.placement import (
    Blocks,
    compute_device,
    is_sharded,
    locate,
    mesh_groups,
    my_rank,
    replicate,
    whereabouts,
)

# Options that must agree for the matrices of two groups to share a batch.
BATCH_OPTIONS = ("ns_coefficients", "ns_steps", "eps", "adjust_lr_fn", "beta2", "normalize_neurons")


# Other keys of a group of matrices that a plan depends on.
PLANNED_KEYS = ("layout", "ns_dtype", "momentum_dtype")

# Numbers of parameters, by the ranks that share them and the device that computes them.
Teams = dict[tuple[tuple[int, ...], torch.device], list[int]]
Groups = dict[tuple[tuple[int, ...], str], dist.ProcessGroup | None]


class Member(NamedTuple):
    """A trainable parameter with its group and its name for messages."""

    parameter: Tensor
    group: Mapping[str, Any]
    name: str


@dataclass(frozen=True)
class Team:
    """Ranks that hold the same parameters together.

    Attributes:
        group: Their process group.
        device: Where their messages are kept.
        members: Numbers of their parameters.
        rounds: Buckets that travel, in order.
        asks: Whether who has a gradient travels to the owners: where shards differ, so may gradients. Of what every
            rank holds whole nothing travels there, and it comes back with the directions.
        copies: Of which parameters several ranks hold the same part, by number, with name and place.
    """

    group: dist.ProcessGroup
    device: torch.device
    members: list[int]
    rounds: list[Bucket]
    asks: bool
    copies: Mapping[int, tuple[str, Blocks]]


@dataclass(frozen=True)
class StepPlan:
    """All a step needs to know besides numbers.

    Attributes:
        signature: Changes when the plan must be made anew.
        parameters: Holding them keeps the identities in ``signature`` unique.
        teams: Of more than one rank, in the order of ``_teams``.
        local: Buckets without messages.
        groups: Process groups in use, by ranks and kind of device.
        asked: Numbers of the parameters about whose gradients ranks ask each other at every step, see
            ``gradient_blocks``.
    """

    signature: Hashable
    parameters: Sequence[Tensor]
    teams: list[Team]
    local: list[Bucket]
    groups: Groups
    asked: frozenset[int]


def ns_dtype(member: Member) -> torch.dtype:
    """Return the dtype of the products: the group's, or what the device multiplies fast."""
    name = member.group["ns_dtype"]
    if name is None:
        return fast_matmul_dtype(compute_device(member.parameter))
    return NS_DTYPES[str(name).removeprefix("torch.")]  # an edited group may hold the dtype itself


def sign(members: Iterable[Member], options: Mapping[str, Any]) -> Hashable:
    """Return what a plan depends on, cheap enough for every step: identities, placements and batch options."""
    rows: list[Hashable] = []
    for parameter, group, _ in members:
        if group["algorithm"] == "normuon":
            rows.append(
                (id(parameter), whereabouts(parameter), *map(group.__getitem__, PLANNED_KEYS), _batch_options(group))
            )
        else:
            rows.append((id(parameter), whereabouts(parameter)))
    return (*rows, options["bucket_bytes"], options["replicas"], id(options["process_group"]))


def plan_step(members: Sequence[Member], options: Mapping[str, Any], previous: StepPlan | None) -> StepPlan:
    """Plan the steps of ``members``.

    Args:
        members: Every trainable parameter, in the order of the groups.
        options: ``bucket_bytes``, ``replicas`` and ``process_group`` of the optimizer; ``ignored`` says of a parameter
            whether its gradient is every rank's own.
        previous: The plan before this one, whose process groups are used again.

    Raises:
        ValueError: If a placement cannot be planned, a shard is not where its placements say, or the ranks plan
            different steps; on every rank of the team, naming the parameter.
    """
    groups = dict(previous.groups) if previous is not None else {}
    blocks = [_locate(member, options) for member in members]
    asked = _agree(members, blocks, _teams(members, blocks), groups, options, previous)
    if options["replicas"] == "redundant":
        blocks = [_own_replica(each) for each in blocks]
    teams = _teams(members, blocks)
    plan = StepPlan(sign(members, options), [member.parameter for member in members], [], [], groups, asked)
    for (ranks, device), numbers in teams.items():
        group = _group(groups, ranks, device, [members[number].parameter for number in numbers], options)
        _plan_team(plan, members, ranks, group, device, numbers, blocks, options["bucket_bytes"])
    return plan


def _teams(members: Sequence[Member], blocks: Sequence[tuple[Blocks, ...]]) -> Teams:
    """Return the numbers of the members by the ranks that share them, and by device.

    Small teams first, then by their ranks: an order that is the same on all ranks that share any team, so that no two
    wait for each other in different ones.
    """
    teams: Teams = {}
    for number, (member, (where, *_)) in enumerate(zip(members, blocks, strict=True)):
        teams.setdefault((where.ranks, compute_device(member.parameter)), []).append(number)
    return dict(sorted(teams.items(), key=lambda team: (len(team[0][0]), team[0][0], team[0][1].type)))


def _agree(
    members: Sequence[Member],
    blocks: Sequence[tuple[Blocks, ...]],
    teams: Teams,
    groups: Groups,
    options: Mapping[str, Any],
    previous: StepPlan | None,
) -> frozenset[int]:
    """Make the process groups that are missing, and raise on every rank that would wait for one that plans otherwise.

    What is found in a small team is told to the larger ones, whose other ranks know nothing of it. Returns what
    ``StepPlan.asked`` says.
    """
    error: ValueError | None = None
    asked: list[int] = []
    before = {id(previous.parameters[number]) for number in previous.asked} if previous is not None else set()
    for (ranks, device), numbers in teams.items():
        group = _group(groups, ranks, device, [members[number].parameter for number in numbers], options)
        if group is None:
            continue
        facts = _facts([members[number] for number in numbers], [blocks[number][0] for number in numbers])
        told = "no error before" if error is None else f"an error before ({error})"
        try:
            check_equal([options_in_words(options), told, *facts.lines], group, device)
            facts.check()
        except ValueError as found:
            error = error or found
        else:
            flags = [is_elsewhere(each) or id(each) in before for each in (members[n].parameter for n in numbers)]
            asked += numbers if any(any_rank([any(flags)], group, device)) else []
    if error is not None:
        raise error
    return frozenset(asked)


def _plan_team(
    plan: StepPlan,
    members: Sequence[Member],
    ranks: tuple[int, ...],
    group: dist.ProcessGroup | None,
    device: torch.device,
    numbers: list[int],
    blocks: Sequence[tuple[Blocks, ...]],
    bucket_bytes: int,
) -> None:
    """Add the buckets of the parameters that lie on ``ranks``."""
    stacks = [
        stack
        for number in numbers
        if members[number].group["algorithm"] == "normuon"
        for stack in _divide(number, members[number], blocks[number], bucket_bytes)
    ]
    asks = any(not blocks[number][0].is_replicated for number in numbers)
    copies = {
        number: (members[number].name, blocks[number][0]) for number in numbers if blocks[number][0].replica_count > 1
    }
    notes = {"note_bytes": len(numbers) if asks else 0, "back_note_bytes": 0 if asks else len(numbers)}
    buckets = plan_buckets(stacks, len(ranks), ranks.index(my_rank()), group, bucket_bytes, **notes)
    plan.local.extend(buckets.local)
    if group is not None:
        plan.teams.append(Team(group, device, numbers, buckets.rounds, asks and bool(buckets.rounds), copies))


def _divide(number: int, member: Member, blocks: tuple[Blocks, ...], bucket_bytes: int) -> list[Stack]:
    return divide(
        number,
        parse_layout(member.group["layout"]),
        tuple(member.parameter.shape),
        blocks,
        dtype=ns_dtype(member),
        device=compute_device(member.parameter),
        ns_steps=member.group["ns_steps"],
        ns_coefficients=member.group["ns_coefficients"],
        options=_batch_options(member.group),
        bucket_bytes=bucket_bytes,
    )


def _locate(member: Member, options: Mapping[str, Any]) -> tuple[Blocks, ...]:
    """Return where a parameter and its small state lie, on all ranks that hold any of it."""
    parameter, group, name = member
    shapes = [tuple(parameter.shape)]
    is_matrix = group["algorithm"] == "normuon"
    if is_matrix:
        layout = parse_layout(group["layout"])
        shapes.append(layout.neuron_state_shape(shapes[0]))
        if group["adjust_lr_fn"] == MATCH_PROGRESS:
            shapes.append(layout.matrix_state_shape(shapes[0]))
    process_group = options["process_group"]
    rank = my_rank()
    try:
        blocks = tuple(locate(parameter, shape, divided=False) for shape in shapes)
    except ValueError as error:
        raise ValueError(f"{name!r}: {error}.") from None
    if rank not in blocks[0].ranks:
        raise ValueError(
            f"{name!r} lies on ranks {blocks[0].ranks}, and this is rank {rank}: leave it out of the groups here."
        )
    if process_group is not None and is_matrix and not is_sharded(parameter) and not options["ignored"](parameter):
        ranks = tuple(dist.get_process_group_ranks(process_group))
        blocks = tuple(replicate(shape, ranks) for shape in shapes)
    return blocks


def _own_replica(blocks: tuple[Blocks, ...]) -> tuple[Blocks, ...]:
    """Return the same as seen by the ranks that hold a parameter once, together with this one."""
    where = blocks[0]
    replica = where.replicas[where.ranks.index(my_rank())]
    ranks = tuple(rank for rank, other in zip(where.ranks, where.replicas, strict=True) if other == replica)
    return tuple(each.restrict(ranks) for each in blocks)


def _facts(members: Sequence[Member], blocks: Sequence[Blocks]) -> Facts:
    dtypes = [ns_dtype(member) if member.group["algorithm"] == "normuon" else None for member in members]
    return compared_facts([(*row, dtype, where) for row, dtype, where in zip(members, dtypes, blocks, strict=True)])


def _batch_options(group: Mapping[str, Any]) -> tuple[Any, ...]:
    # A list that came back from a checkpoint is the tuple it was.
    return tuple(tuple(value) if isinstance(value, list) else value for value in map(group.__getitem__, BATCH_OPTIONS))


def _group(
    groups: Groups,
    ranks: tuple[int, ...],
    device: torch.device,
    parameters: Sequence[Tensor],
    options: Mapping[str, Any],
) -> dist.ProcessGroup | None:
    """Return the process group of ``ranks``: one of ``groups``, the user's, a mesh's, or else a new one."""
    key = (ranks, device.type)
    if key not in groups:
        of_meshes = {group for each in parameters for group in mesh_groups(each)}
        groups[key] = create_group(ranks, options["process_group"], of_meshes)
    return groups[key]
