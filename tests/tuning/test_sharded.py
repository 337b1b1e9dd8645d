"""Two processes that train one model, FSDP2 or DDP, search as one process does on the batches of both."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from normuon_plugins.tuning import find_learning_rates
from tests.ranks import run_ranks

ARGUMENTS = {"lr": 1e-2, "steps": 4, "budget": 5, "max_grad_norm": 0.5}
ARGUMENTS |= {"ns_dtype": "float64", "adjust_lr_fn": "match_rms_adamw"}


def make():
    """Return a model with uneven rows and a buffer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    model.register_buffer("calls", torch.zeros(()))
    return model


def batches(rank, ranks):
    """Return this rank's part of every batch."""
    inputs = torch.randn(6, 8, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [x.chunk(ranks)[rank] for x in inputs]


def loss(model, x):
    return (model(x).squeeze(1) - x.sum(1)).square().mean()


def search(kind, rank, ranks):
    """Return the trials, and whether this rank's part of the model ended as it began."""
    model = make()
    if kind == "fsdp2":
        fully_shard(model[2])
        fully_shard(model)
    elif kind == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    before = [local(tensor).clone() for tensor in model.parameters()]
    lines = []
    found = find_learning_rates(model, batches(rank, ranks), loss=loss, progress=lines.append, **ARGUMENTS)
    after = [local(tensor) for tensor in model.parameters()]
    same = all(one.equal(other) for one, other in zip(before, after, strict=True))
    return [(trial.rates, trial.steps, trial.loss) for trial in found.trials], same, bool(lines)


def local(tensor):
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def on_a_rank():
    return {kind: search(kind, dist.get_rank(), 2) for kind in ("fsdp2", "ddp")}


@pytest.fixture(scope="module")
def found():
    return run_ranks(on_a_rank, 2)


@pytest.mark.parametrize("kind", ["fsdp2", "ddp"])
def test_all_ranks_search_as_one_process_does(found, kind):
    alone, _, _ = search("alone", 0, 1)
    for rank in found:
        trials, same, _ = rank[kind]
        assert same
        assert [trial[:2] for trial in trials] == [trial[:2] for trial in alone]
        assert [trial[2] for trial in trials] == pytest.approx([trial[2] for trial in alone], rel=1e-6)


@pytest.mark.parametrize("kind", ["fsdp2", "ddp"])
def test_one_rank_speaks(found, kind):
    assert [rank[kind][2] for rank in found] == [True, False]
