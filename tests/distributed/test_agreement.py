"""Ranks that see different things: missing gradients, NaN on one of them, different plans. Nothing hangs."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from normuon_plugins import NorMuon
from tests.distributed import cases
from tests.ranks import run_ranks

# Matrices that travel, that lie whole on one rank, experts, and AdamW parameters.
MISSING_ON_ONE = ("rows_divide", "one_row", "tall", "experts", "interleaved", "bias", "embedding")
MISSING_ON_ALL = ("square_like_the_first", "transposed_experts", "fewer_rows_than_ranks", "scalar_gain")


def step_with_gaps(model, optimizer, step, rank):
    """Step with gradients of which some are missing everywhere, and some on ``rank`` only."""
    for name, gradient in cases.tensors(1000 + step).items():
        parameter = model[name]
        parameter.grad = cases.place_like(gradient, parameter)
        if name in MISSING_ON_ALL or (name in MISSING_ON_ONE and dist.get_rank() == rank):
            parameter.grad = None
    optimizer.step()


def step_with_zeros(model, optimizer, step, sharded, rank):
    """Step one process with zeros where ``rank`` had no gradient; ``sharded`` says what that rank held."""
    for name, gradient in cases.tensors(1000 + step).items():
        if name in MISSING_ON_ONE:
            mine = cases.place_like(gradient, sharded[name])
            if dist.get_rank() == rank:
                mine.to_local().zero_()
            gradient = mine.full_tensor()
        model[name].grad = None if name in MISSING_ON_ALL else gradient
    optimizer.step()


def gaps(options):
    """Return the largest difference from one process after a full step, a step with gaps, and a full step."""
    line = init_device_mesh("cpu", (dist.get_world_size(),))
    found = []
    for dim in (0, 1):
        for first in (0, 1):
            sharded = cases.dtensors(line, lambda shape, dim=dim: [Shard(min(dim, len(shape) - 1))])()
            single = cases.plain()
            ours = cases.optimizer_of(sharded.named_parameters(), **options)
            reference = cases.optimizer_of(single.named_parameters(), **options)
            if first:
                cases.steps(sharded, ours, 0, 1)
                cases.steps(single, reference, 0, 1)
            before = cases.whole_run(single, reference) if first else cases.tensors(0)
            step_with_gaps(sharded, ours, 1, rank=1)
            step_with_zeros(single, reference, 1, sharded, rank=1)
            run = cases.whole_run(sharded, ours)
            untouched = [name for name in before if name.split(".")[0] in MISSING_ON_ALL]
            assert all(torch.equal(run[name], before[name]) for name in untouched)
            assert all(not torch.equal(run[name], before[name]) for name in MISSING_ON_ONE)
            cases.steps(sharded, ours, 2, 3)
            cases.steps(single, reference, 2, 3)
            run, expected = cases.whole_run(sharded, ours), cases.whole_run(single, reference)
            found.append(max(float((run[name] - e).norm() / e.norm().clamp_min(1e-30)) for name, e in expected.items()))
    return found


@pytest.mark.parametrize("options", [{}, {"bucket_bytes": 300, "nesterov": False}])
def test_a_gradient_missing_on_one_rank_is_zero_there_and_on_all_ranks_leaves_alone(options):
    for found in run_ranks(gaps, 3, options):
        assert max(found) < 1e-6


def outcome(function):
    """Return the error's text, or None."""
    try:
        function()
    except (ValueError, FloatingPointError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def two_layers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Linear(8, 4, bias=False))
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    return model


def disagree():
    rank = dist.get_rank()
    found = {}
    model = two_layers()
    before = [cases.gathered(parameter) for parameter in model.parameters()]
    if rank == 1:  # frozen and without a gradient: one that has a gradient is stepped, as in torch
        model[0].weight.requires_grad_(False).grad = None
    found["frozen"] = outcome(NorMuon(model.named_parameters()).step)
    model = two_layers()
    found["bucket_bytes"] = outcome(NorMuon(model.named_parameters(), bucket_bytes=100 + rank).step)
    model = two_layers()
    found["nonfinite"] = outcome(NorMuon(model.named_parameters(), nonfinite=("skip", "raise")[rank]).step)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    replica = nn.Parameter(DTensor.from_local(torch.ones(4, 4), mesh, [Replicate()], run_check=False))
    replica.grad = torch.ones_like(replica)
    found["replicas"] = outcome(NorMuon([replica], replicas=("share", "redundant")[rank]).step)
    model = two_layers()
    pairs = list(model.named_parameters())
    found["order"] = outcome(NorMuon(pairs if rank else pairs[::-1]).step)
    model = two_layers()
    groups = [{"params": list(model.named_parameters()), "layout": "o i" if rank else "i o"}]
    found["layout"] = outcome(NorMuon(groups).step)
    model = two_layers()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    local = torch.ones(3 if rank == 0 else 5, 6)
    uneven = DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=torch.Size((8, 6)), stride=(6, 1))
    model[0].weight = nn.Parameter(uneven)
    model[0].weight.grad = uneven.clone()
    found["shard"] = outcome(NorMuon(model.named_parameters()).step)
    narrow = DTensor.from_local(torch.ones(4, 5), mesh, [Shard(0)], run_check=False, shape=(8, 6), stride=(6, 1))
    misplaced = nn.Parameter(narrow)
    misplaced.grad = narrow.clone()
    found["every shard"] = outcome(NorMuon([("w", misplaced)]).step)
    partial = nn.Parameter(DTensor.from_local(torch.ones(4, 6), mesh, [Partial()], run_check=False))
    partial.grad = partial.detach().clone()
    found["partial"] = outcome(NorMuon([("w", partial)]).step)
    model = two_layers()
    optimizer = NorMuon(model.named_parameters())
    optimizer.step()
    moved = [not torch.equal(cases.gathered(p), start) for p, start in zip(model.parameters(), before, strict=True)]
    return found, moved


def disagree_in_a_smaller_team():
    """Two meshes of two ranks and one of four: the first two ranks differ on their own mesh only."""
    rank = dist.get_rank()
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    line = init_device_mesh("cpu", (4,))
    parameters = [
        nn.Parameter(DTensor.from_local(torch.ones(rows, 4), mesh, [Shard(0)], run_check=False))
        for rows, mesh in ((2, line), (3, square["tp"]), (3, square["tp"]))
    ]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    named = list(zip(("everywhere", "first", "second"), parameters, strict=True))
    return outcome(NorMuon(named[:2] if rank == 1 else named).step)


def test_a_difference_in_a_smaller_team_is_told_to_the_larger_one():
    """Its other ranks would wait for the two that have raised."""
    first, second, third, fourth = run_ranks(disagree_in_a_smaller_team, 4)
    assert "rank 0 has 'second'" in first
    assert first == second
    assert "rank 0 has an error before (ranks plan different steps" in third
    assert third == fourth


def test_ranks_that_plan_differently_are_told_the_first_difference_before_anything_moves():
    results = run_ranks(disagree, 2)
    for found, moved in results:
        assert all(moved)
        assert "rank 0 has '0.weight': normuon (8, 6)" in found["frozen"]
        assert "rank 1 has '1.weight': normuon (4, 8)" in found["frozen"]
        assert "rank 0 has bucket_bytes=100, " in found["bucket_bytes"]
        assert "rank 1 has bucket_bytes=101, " in found["bucket_bytes"]
        assert "nonfinite='skip', rank 1 has" in found["nonfinite"]
        assert "replicas='share'" in found["replicas"]
        assert "replicas='redundant'" in found["replicas"]
        assert "rank 0 has '1.weight'" in found["order"]
        assert "'i o'" in found["layout"]
        assert "a local shard (3, 6) where its placements mean (4, 6)" in found["shard"]
        assert "'w': normuon (8, 6)" in found["every shard"]
        assert "a local shard (4, 5) where its placements mean (4, 6)" in found["every shard"]
        assert "'w': placement Partial(sum) is neither a shard nor a replica" in found["partial"]
    assert results[0][0] == results[1][0]


def nonfinite():
    rank, world = dist.get_rank(), dist.get_world_size()
    found = {}
    for policy in ("skip", "raise"):
        model = cases.fsdp(init_device_mesh("cpu", (world,)))()
        optimizer = cases.optimizer_of(model.named_parameters(), nonfinite=policy)
        cases.steps(model, optimizer, 0, 1)
        before = cases.whole_run(model, optimizer)
        for name, gradient in cases.tensors(1001).items():
            model[name].grad = cases.place_like(gradient, model[name])
        for name in ("rows_divide", "embedding", "one_row"):
            local = model[name].grad.to_local()
            if rank == 0:
                local[0, 0] = float("nan")
        error = outcome(optimizer.step)
        after = cases.whole_run(model, optimizer)
        changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
        found[policy] = error, sorted(set(cases.PARAMETERS) - changed), optimizer.skipped_steps
    return found


def test_nonfinite_gradients_on_one_rank_are_skipped_or_raised_on_all():
    bad = ["embedding", "one_row", "rows_divide"]
    for found in run_ranks(nonfinite, 3):
        assert found["skip"] == (None, bad, 3)
        error, unchanged, _ = found["raise"]
        assert all(f"'{name}'" in error for name in bad)
        assert unchanged == sorted(cases.PARAMETERS)


def nonfinite_in_a_smaller_team():
    """NaN on a mesh of the first two ranks, beside a parameter on all four."""
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    line = init_device_mesh("cpu", (4,))
    parameters = [
        nn.Parameter(DTensor.from_local(torch.ones(3, 4), mesh, [Shard(0)], run_check=False))
        for mesh in (line, square["tp"])
    ]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    if dist.get_rank() == 1:
        parameters[1].grad.to_local()[0, 0] = float("nan")
    return outcome(NorMuon(list(zip(("everywhere", "here"), parameters, strict=True)), nonfinite="raise").step)


def test_nonfinite_raises_on_ranks_that_hold_nothing_of_the_parameter():
    messages = run_ranks(nonfinite_in_a_smaller_team, 4)
    assert all("infinity in ['here']" in message for message in messages[:2])
    assert all("infinity in a parameter of other ranks" in message for message in messages[2:])


def moved_between_meshes():
    """Return the difference from one process after a parameter was laid out anew under the same identity."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    start = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    weight = nn.Parameter(distribute_tensor(start, mesh, [Shard(0)], src_data_rank=None))
    single = nn.Parameter(start.clone())
    ours, reference = NorMuon([weight], lr=0.1), NorMuon([single], lr=0.1)
    for placement in (Shard(0), Shard(1)):
        if placement == Shard(1):
            torch.utils.swap_tensors(weight, nn.Parameter(weight.detach().redistribute(mesh, [placement])))
            state = {
                key: value.redistribute(mesh, ours_placements(key, placement))
                for key, value in ours.state.popitem()[1].items()
            }
            ours.state[weight] = state
        gradient = torch.arange(24.0).reshape(6, 4).sin()
        weight.grad = distribute_tensor(gradient, mesh, [placement], src_data_rank=None)
        single.grad = gradient.clone()
        ours.step()
        reference.step()
    return float((weight.full_tensor() - single).norm())


def ours_placements(key, placement):
    return [placement] if key == "momentum_buffer" else [Replicate()]


def test_a_parameter_laid_out_anew_is_planned_anew():
    """The plan once looked at identities alone, and cut the new shards by the old boxes."""
    for difference in run_ranks(moved_between_meshes, 2):
        assert difference < 1e-6


def summed_gradient():
    """Return the difference of a replicated parameter whose gradient is a sum still to be taken, from one process."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    start, gradient = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.arange(24.0).reshape(6, 4)
    weight = nn.Parameter(DTensor.from_local(start.clone(), mesh, [Replicate()], run_check=False))
    share = gradient * (0.25 if dist.get_rank() else 0.75)
    weight.grad = DTensor.from_local(share, mesh, [Partial()], run_check=False)
    single = nn.Parameter(start.clone())
    single.grad = gradient
    NorMuon([weight], lr=0.1).step()
    NorMuon([single], lr=0.1).step()
    assert isinstance(weight.grad, DTensor)
    assert weight.grad.placements == (Partial(),)
    return float((weight.to_local() - single).norm()), float((single - start).norm())


def test_a_gradient_with_other_placements_than_its_parameter_is_brought_to_them():
    for difference, moved in run_ranks(summed_gradient, 2):
        assert difference < 1e-6
        assert moved > 0.1
