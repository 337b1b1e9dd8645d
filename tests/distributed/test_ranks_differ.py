"""Ranks that hold different things: gradients, options, meshes in another order. Right, or said on all of them."""

import math
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from normuon_plugins import NorMuon, clip_grad_norm_
from normuon_plugins.distributed.agreement import check_equal, create_group
from tests.ranks import run_ranks

# What one rank alone says, by the key of the group or option that the message must name.
OPTIONS = {
    "lr": 0.3,
    "momentum": 0.5,
    "weight_decay": 0.3,
    "nesterov": False,
    "beta2": 0.5,
    "adamw_betas": (0.5, 0.5),
    "adamw_eps": 1e-4,
    "compile": True,
    "orthogonalize_fn": torch.sign,
}


def numbers(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def on(mesh, placement, seed, *shape):
    """Return a parameter and its whole start."""
    start = numbers(seed, *shape)
    return nn.Parameter(distribute_tensor(start, mesh, [placement], src_data_rank=None)), start


def single_step(start, gradient):
    """Return what one process makes of a matrix."""
    weight = nn.Parameter(start.clone())
    weight.grad = gradient.clone()
    NorMuon([weight], lr=0.1).step()
    return weight.detach()


def error_of(function):
    try:
        function()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def sums_still_to_be_taken(mesh):
    """Return differences of norm and weights where a gradient is Partial, and some rank has none or an empty shard."""
    found = []
    for rows, lacking in ((2, None), (3, 0), (2, 0), (3, 2)):
        weight, start = on(mesh, Shard(0), 0, rows, 4)
        parts = {rank: numbers(10 + rank, rows, 4) for rank in range(3) if rank != lacking}
        if dist.get_rank() in parts:
            weight.grad = DTensor.from_local(parts[dist.get_rank()].clone(), mesh, [Partial()], run_check=False)
        single = nn.Parameter(start.clone())
        single.grad = sum(parts.values())
        norm, expected = (
            function([each], 0.1) for function, each in ((clip_grad_norm_, weight), (nn.utils.clip_grad_norm_, single))
        )
        NorMuon([weight], lr=0.1).step()
        NorMuon([single], lr=0.1).step()
        found.append(float((weight.full_tensor() - single).detach().norm() + (norm - expected).abs()))
    return found


def teams_in_each_ranks_own_order():
    """Three ranks, a mesh for each pair of them: return differences of norm and weights from one process."""
    rank = dist.get_rank()
    meshes = [DeviceMesh("cpu", pair) for pair in ((0, 1), (0, 2), (1, 2))]
    order = {0: (0, 1), 1: (2, 0), 2: (1, 2)}[rank]
    pairs = {number: on(meshes[number], Shard(0), number, 4, 6) for number in order}
    gradients = {number: numbers(10 + number, 4, 6) for number in order}
    for number, (weight, _) in pairs.items():
        weight.grad = distribute_tensor(gradients[number], meshes[number], [Shard(0)], src_data_rank=None)
    weights = [weight for weight, _ in pairs.values()]
    norm = clip_grad_norm_(weights, 1e9)
    NorMuon(weights, lr=0.1, nonfinite="raise").step()
    found = [float(norm - torch.stack([each.norm() for each in gradients.values()]).norm())]
    for number, (weight, start) in sorted(pairs.items()):
        found.append(float((weight.full_tensor() - single_step(start, gradients[number])).norm()))
    return found


def gradients_that_only_some_replicas_have(mesh):
    """Return norms over what is replicated, where a rank lacks a gradient or has another one."""
    rank = dist.get_rank()
    weight, _ = on(mesh, Replicate(), 0, 2, 2)
    shard, _ = on(mesh, Shard(0), 0, 3, 2)
    plain = nn.Parameter(torch.zeros(2))
    shard.grad = torch.ones_like(shard)
    if rank != 1:
        weight.grad = torch.full_like(weight, 2.0)
    plain.grad = torch.tensor([3.0, 4.0]) * (rank == 2)
    shard_of_nan, _ = on(mesh, Shard(0), 0, 3, 2)
    shard_of_nan.grad = torch.ones_like(shard_of_nan)
    if rank == 1:
        shard_of_nan.grad.to_local()[0, 0] = math.nan
    return (
        clip_grad_norm_([weight], 1e9).item(),
        clip_grad_norm_([shard, weight, plain], 1e9).item(),
        math.isnan(clip_grad_norm_([shard_of_nan], 1.0, norm_type=math.inf)),
    )


def a_replica_without_a_gradient():
    """Return what is said where a rank misses the gradient of a plain matrix, and what redundant replicas do."""
    rank = dist.get_rank()
    names = ("first", "second", "third")
    weights = [nn.Parameter(numbers(number, 4, 6)) for number in range(3)]
    for options in ({}, {"replicas": "redundant"}):
        optimizer = NorMuon(zip(names, weights, strict=True), lr=0.1, process_group=dist.group.WORLD, **options)
        for step in range(2):
            for number, weight in enumerate(weights):
                weight.grad = numbers(10 + number, 4, 6)
            if step == 1 and rank == 2:
                weights[1].grad = None
            before = [weight.detach().clone() for weight in weights]
            error = error_of(optimizer.step)
        moved = [not torch.equal(weight, start) for weight, start in zip(weights, before, strict=True)]
        yield error, moved


def options_of_one_rank(mesh):
    """Return what is said of each option that the second rank sets otherwise."""
    rank = dist.get_rank()
    found = {}
    for option, value in {**OPTIONS, "tensor lr": torch.tensor(0.3)}.items():
        matrix, bias = on(mesh, Shard(0), 0, 4, 6)[0], on(mesh, Shard(0), 0, 5)[0]
        matrix.grad, bias.grad = torch.ones_like(matrix), torch.ones_like(bias)
        groups = [{"params": [("matrix", matrix)]}, {"params": [("bias", bias)], "algorithm": "adamw"}]
        chosen = {option.removeprefix("tensor "): value} if rank == 1 else {}
        if option == "tensor lr":
            chosen = {"lr": value + rank}
        optimizer = NorMuon(groups, **{"lr": 0.1, "adamw_lr": 0.1, **chosen})
        found[option] = error_of(optimizer.step)
    optimizer = NorMuon(groups, lr=0.1)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.05  # as a schedule does: the same on all ranks, and again when it plans anew
    bias.requires_grad_(False)
    optimizer.step()
    return found


def a_long_plan_that_differs():
    """Return what is said of 300 lines of which one differs, and how much of them was gathered."""
    lines = [f"'weight {number}': normuon; lr=0.1; eps=0" for number in range(300)]
    lines += ["more"] * dist.get_rank()
    gathered = []
    original = dist.all_gather_object

    def all_gather_object(every, mine, group):
        gathered.append(len(mine))
        original(every, mine, group=group)

    with mock.patch.object(dist, "all_gather_object", all_gather_object):
        longer = error_of(lambda: check_equal(lines, dist.group.WORLD, torch.device("cpu")))
        lines = lines[:300]
        lines[7] = lines[7].replace("0.1", str(dist.get_rank()))
        other = error_of(lambda: check_equal(lines, dist.group.WORLD, torch.device("cpu")))
    return longer, other, max(gathered)


def groups_that_are_made():
    """Return whether groups that exist are taken, and on which bound device a new one is made."""
    world = dist.group.WORLD
    pair = DeviceMesh("cpu", [0, 2])
    bound = []
    original = dist.new_group

    def new_group(*arguments, **options):
        bound.append(world.bound_device_id)
        return original(*arguments, **options)

    found = []
    world.bound_device_id = torch.device("cuda", 0)
    with mock.patch.object(dist, "new_group", new_group):
        found.append(create_group((0, 1, 2)) is world)
        if dist.get_rank() != 1:
            found.append(create_group((0, 2), None, pair.get_all_groups()) is pair.get_group())
            found.append(len(bound) == 0)
            made = create_group((0, 2))  # of which the other rank knows nothing
            dist.all_reduce(torch.ones(1), group=made)
            found.append(bound == [None])
    found.append(world.bound_device_id == torch.device("cuda", 0))
    world.bound_device_id = None
    return found


def three_ranks():
    mesh = init_device_mesh("cpu", (3,))
    descending = nn.Parameter(distribute_tensor(numbers(0, 3, 4), DeviceMesh("cpu", [2, 0, 1]), [Shard(0)]))
    descending.grad = torch.ones_like(descending)
    return {
        "sums": sums_still_to_be_taken(mesh),
        "teams": teams_in_each_ranks_own_order(),
        "norms": gradients_that_only_some_replicas_have(mesh),
        "replica": list(a_replica_without_a_gradient()),
        "options": options_of_one_rank(mesh),
        "long plan": a_long_plan_that_differs(),
        "groups": groups_that_are_made(),
        "descending": error_of(NorMuon([("w", descending)]).step),
    }


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(three_ranks, 3)


def test_a_rank_without_a_gradient_joins_in_bringing_it_to_its_place(ranks):
    for found in ranks:
        assert max(found["sums"]) < 1e-5


def test_teams_are_visited_in_one_order(ranks):
    for found in ranks:
        assert max(map(abs, found["teams"])) < 1e-5


def test_what_replicas_do_not_share_counts_once_and_alike_on_all_ranks(ranks):
    for found in ranks:
        replicated, together, is_nan = found["norms"]
        assert replicated == pytest.approx(4.0)
        assert together == pytest.approx(math.sqrt(6 + 16 + 25))
        assert is_nan


def test_a_replica_without_a_gradient_is_named_on_all_ranks_or_left_alone(ranks):
    for rank, found in enumerate(ranks):
        (error, moved), (no_error, moved_alone) = found["replica"]
        assert "'second' has a gradient on ranks [0, 1] and none on ranks [2]" in error
        assert "replicas='redundant'" in error
        assert moved == [False] * 3
        assert no_error is None
        assert moved_alone == [True, rank != 2, True]


def test_options_that_one_rank_sets_otherwise_are_named_before_the_first_step(ranks):
    for found in ranks:
        for option, error in found["options"].items():
            key = option.removeprefix("adamw_").removeprefix("tensor ")
            assert error.startswith("ValueError: ranks plan different steps: rank 0 has "), option
            assert error.count(f"{key}=") == 2, error


def test_of_a_plan_that_differs_one_line_is_gathered(ranks):
    for found in ranks:
        longer, other, size = found["long plan"]
        assert "rank 0 has nothing more, rank 1 has more." in longer
        assert "rank 0 has 'weight 7': normuon; lr=0, rank 1 has 'weight 7': normuon; lr=1." in other
        assert size < 50


def test_process_groups_that_exist_are_used_and_new_ones_split_no_communicator(ranks):
    assert [len(found["groups"]) for found in ranks] == [5, 2, 5]
    assert all(all(found["groups"]) for found in ranks)


def test_a_mesh_whose_ranks_do_not_ascend_is_refused(ranks):
    for found in ranks:
        assert found["descending"].startswith("ValueError: 'w': its mesh has rank 2 before rank 0 along dimension 0")
