"""A diagnosis of sharded matrices equals that of the same matrices in one process, and the ranks share the work."""

import json

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate

from normuon_plugins import NorMuon
from normuon_plugins.diagnostics import diagnose, live, watch
from tests.distributed import cases
from tests.ranks import run_ranks

STEPS = 2


def shown(diagnosis):
    return {matrix.name.split(".")[-1]: matrix.to_dict() for matrix in diagnosis.matrices}


def of_all_ways(folder):
    """Return for each way: the numbers, and how many matrices this rank decomposed itself."""
    found = {}
    for way, make in cases.ways().items():
        model = make()
        sharded = [
            parameter
            for parameter in model.parameters()
            if isinstance(parameter, DTensor) and any(not isinstance(p, Replicate) for p in parameter.placements)
        ]
        optimizer = cases.optimizer_of(model.named_parameters(), ns_dtype="float32")
        handle = watch(optimizer, every=STEPS, folder=folder / way, suffix=".json")
        cases.steps(model, optimizer, 0, STEPS)
        handle.remove()
        decomposed = []
        original = live.diagnose_parameter
        live.diagnose_parameter = lambda *a, **k: decomposed.append(a[0]) or original(*a, **k)  # noqa: B023
        try:
            found[way] = (shown(diagnose(optimizer)), len(decomposed), len(sharded))
        finally:
            live.diagnose_parameter = original
    dist.barrier()
    return found


@pytest.fixture(scope="module")
def alone():
    model = cases.plain()
    optimizer = cases.optimizer_of(model.named_parameters(), ns_dtype="float32")
    cases.steps(model, optimizer, 0, STEPS)
    return shown(diagnose(optimizer)), shown(diagnose(optimizer, gradients=True))


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("diagnostics")
    return run_ranks(of_all_ways, request.param, folder), folder


def assert_shown(numbers, expected, way):
    assert numbers.keys() == expected.keys(), way
    for name, matrix in expected.items():
        assert matrix["shape"] == numbers[name]["shape"]
        for stage in ("momentum", "muon", "normuon"):
            for quantity in ("stable_rank", "neuron_spread", "dead", "dominant"):
                close = pytest.approx(matrix[stage][quantity], rel=1e-3, abs=1e-4)
                assert numbers[name][stage][quantity] == close, (way, name, stage, quantity)


def test_every_way_shows_what_one_process_shows(ranks, alone):
    found, _ = ranks
    for way in found[0]:
        for of_rank in found:
            assert_shown(of_rank[way][0], alone[0], way)


def test_ranks_divide_the_parameters(ranks):
    found, _ = ranks
    matrices = sum(layout is not None for layout, _ in cases.PARAMETERS.values())
    for way in found[0]:
        counts = [of_rank[way][1] for of_rank in found]
        assert sum(counts) == matrices, way
        assert max(counts) < matrices
        assert found[0][way][2] > 0 or way == "replicated"


def test_rank_zero_writes_reports_of_what_the_step_itself_made(ranks, alone):
    """The steps look ahead (Nesterov), and the hook has their gradients."""
    found, folder = ranks
    for way in found[0]:
        (file,) = (folder / way).iterdir()
        written = {matrix["name"].split(".")[-1]: matrix for matrix in json.loads(file.read_text())["matrices"]}
        assert_shown(written, alone[1], way)


def plain_replicas():
    """Plain parameters whose ranks are known to be equal (DDP): the work is divided."""
    model = cases.plain()
    optimizer = cases.optimizer_of(model.named_parameters(), ns_dtype="float32", process_group=dist.group.WORLD)
    cases.steps(model, optimizer, 0, STEPS)
    ranks = live._ranks(next(model.parameters()), optimizer)
    torch.manual_seed(0)
    return ranks, shown(diagnose(optimizer))


def test_replicas_of_ddp_divide_the_work(alone):
    for ranks, numbers in run_ranks(plain_replicas, 2):
        assert ranks == (0, 1)
        assert_shown(numbers, alone[0], "ddp")


def stage(rank):
    """A pipeline stage: a layer of its own under a name that every stage has, and one that all hold alike."""
    torch.manual_seed(rank)
    own = torch.nn.Parameter(torch.randn(6, 4))
    torch.manual_seed(9)
    shared = torch.nn.Parameter(torch.randn(5, 4))
    optimizer = NorMuon([("layers.0.weight", own), ("shared.weight", shared)], ns_dtype="float32")
    for parameter in (own, shared):
        parameter.grad = parameter.detach().sin()
    optimizer.step()
    return optimizer


def diagnosed_stages():
    return [(m.name, m.to_dict()) for m in diagnose(stage(dist.get_rank()), gradients=True).matrices]


def test_stages_with_the_same_names_are_all_in_the_report_and_replicas_once():
    alone = [{m.name: m.to_dict() for m in diagnose(stage(rank), gradients=True).matrices} for rank in (0, 1)]
    for found in run_ranks(diagnosed_stages, 2):
        assert [name for name, _ in found] == ["layers.0.weight", "layers.0.weight (2)", "shared.weight"]
        assert found[0][1] == alone[0]["layers.0.weight"]
        assert {**found[1][1], "name": "layers.0.weight"} == alone[1]["layers.0.weight"]
        assert found[2][1] == alone[0]["shared.weight"]
