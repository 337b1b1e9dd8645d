"""One step, any mesh: the same weights and state as one process, for every layout, shape and option."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from tests.distributed import cases
from tests.ranks import run_ranks

WORLDS = (1, 2, 3, 4)
# name -> options of NorMuon. The small bucket makes many rounds of every shape.
OPTIONS = {
    "defaults": {},
    "small buckets": {"bucket_bytes": 400},
    "progress, small buckets": {"adjust_lr_fn": "match_progress_adamw", "bucket_bytes": 400},
    "progress, redundant replicas": {"adjust_lr_fn": "match_progress_adamw", "replicas": "redundant"},
    "redundant replicas": {"replicas": "redundant", "nesterov": False},
    "float32 products, original scale": {"ns_dtype": "float32", "adjust_lr_fn": "original", "bucket_bytes": 1000},
}
STEPS = 4


def compare():
    """Return, by way and options: the largest difference from one process, the smallest movement, and sharded names."""
    found = {}
    references = {}
    for options in OPTIONS:
        model = cases.plain()
        optimizer = cases.optimizer_of(model.named_parameters(), **OPTIONS[options])
        cases.steps(model, optimizer, 0, STEPS)
        references[options] = cases.whole_run(model, optimizer)
    start = cases.tensors(0)
    for way, make in cases.ways().items():
        for options in OPTIONS:
            model = make()
            optimizer = cases.optimizer_of(model.named_parameters(), **OPTIONS[options])
            cases.steps(model, optimizer, 0, STEPS)
            run = cases.whole_run(model, optimizer)
            assert run.keys() == references[options].keys()
            difference = max(
                float((run[name] - expected).norm() / expected.norm().clamp_min(1e-30))
                for name, expected in references[options].items()
            )
            moved = min(float((run[name] - tensor).norm()) for name, tensor in start.items())
            found[way, options] = {
                "difference": difference,
                "moved": moved,
                "dtensors": all(isinstance(p, DTensor) for p in model.parameters()),
                "state dtensors": all(
                    isinstance(value, DTensor) and value.placements == parameter.placements
                    for parameter in model.parameters()
                    for key, value in optimizer.state[parameter].items()
                    if key not in ("step", "second_momentum_buffer", "gradient_mean_square")
                ),
                "second moments": {
                    str(value.dtype)
                    for state in optimizer.state.values()
                    for key, value in state.items()
                    if key == "second_momentum_buffer" and isinstance(value, DTensor)
                },
            }
    return found


@pytest.fixture(scope="module", params=WORLDS)
def world(request):
    return run_ranks(compare, request.param)


def test_every_layout_gives_the_weights_and_state_of_one_process(world):
    for found in world:
        assert {key: run["difference"] for key, run in found.items() if not run["difference"] < 1e-6} == {}


def test_the_runs_really_were_sharded_and_really_moved(world):
    for found in world:
        for run in found.values():
            assert run["dtensors"]
            assert run["state dtensors"]
            assert run["second moments"] == {"torch.float32"}
            assert run["moved"] > 1e-4


def replicas(world_size):
    """Return whether plain replicas that share the work are bitwise one process, and what of it was shared."""
    model = cases.plain()
    alone = cases.optimizer_of(model.named_parameters())
    cases.steps(model, alone, 0, STEPS)
    expected = cases.whole_run(model, alone)
    equal, rounds = [], []
    for options in ({}, {"bucket_bytes": 400}, {"replicas": "redundant"}):
        model = cases.plain()
        optimizer = cases.optimizer_of(model.named_parameters(), process_group=dist.group.WORLD, **options)
        cases.steps(model, optimizer, 0, STEPS)
        run = cases.whole_run(model, optimizer)
        equal.append(all(torch.equal(run[name], tensor) for name, tensor in expected.items()))
        rounds.append([len(team.rounds) for team in optimizer._plans[0].teams])
    # A copy has other parameters and no process group, which cannot be copied: it goes on by itself.
    alone_again = copy.deepcopy(optimizer)
    assert alone_again.defaults["process_group"] is None
    assert optimizer.defaults["process_group"] is dist.group.WORLD
    return equal, rounds


@pytest.mark.parametrize("world_size", [2, 3])
def test_plain_replicas_that_share_the_work_are_bitwise_one_process(world_size):
    for equal, rounds in run_ranks(replicas, world_size, world_size):
        assert equal == [True, True, True]
        assert rounds[0] == [1]
        assert rounds[1][0] > 1
        assert rounds[2] == []
