"""Processes that DDP does not keep equal all the time: each does what it would alone, or all of them say so."""

import contextlib
import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import post_localSGD_hook as local_sgd
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

from normuon_plugins import build_normuon
from normuon_plugins.core.shared_work import STEPS_BETWEEN
from normuon_plugins.core.wrappers import follow_averaging
from tests.ranks import run_ranks

OPTIONS = {"lr": 0.1, "ns_dtype": "float64"}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)).double()


def shared(model, **options):
    """Return DDP around a model, and the optimizer that an adapter builds for it: work is shared."""
    wrapped = DistributedDataParallel(model)
    optimizer = build_normuon(model, process_group=dist.group.WORLD, **OPTIONS, **options)
    follow_averaging(optimizer, wrapped)
    return wrapped, optimizer


def batch(step):
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(10 * step + dist.get_rank())).double()


def train(model, optimizer, steps, context=contextlib.nullcontext):
    for step in range(steps):
        with context():
            model(batch(step)).square().sum().backward()
            optimizer.step()
        optimizer.zero_grad()


def difference(model, other):
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


def local_sgd_equals_training_alone():
    alone = network()
    train(alone, build_normuon(alone, **OPTIONS), 3)
    model = network()
    wrapped, optimizer = shared(model)
    train(wrapped, optimizer, 3, wrapped.no_sync)
    assert not any(team.rounds for team in optimizer._plans[0].teams)
    return difference(model, alone)


def ignored_parameter_is_every_ranks_own():
    def islands():
        model = network()
        model.own = nn.Linear(4, 4).double()
        model.forward = lambda x: model[2](model[1](model[0](x + model.own(x))))
        return model

    alone = islands()
    names = ["own.weight", "own.bias"]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(alone, names)
    redundant = build_normuon(alone, **OPTIONS)
    train(DistributedDataParallel(alone), redundant, 3)
    model = islands()
    model._ddp_params_and_buffers_to_ignore = names
    wrapped, optimizer = shared(model)
    train(wrapped, optimizer, 3)
    assert any(team.rounds for team in optimizer._plans[0].teams)
    return difference(model, alone)


def uneven_inputs_end():
    """The rank that has run out of batches joins in DDP's messages only, and waits for no step."""
    results = []
    for make in (shared, lambda model: (DistributedDataParallel(model), build_normuon(model, **OPTIONS))):
        model = network()
        wrapped, optimizer = make(model)
        with Join([wrapped]):
            train(wrapped, optimizer, 3 + 2 * dist.get_rank())
        results.append(model)
    return difference(*results)


def hook_that_averages_later_trains_alone():
    model = network()
    wrapped, optimizer = shared(model)
    wrapped.register_comm_hook(local_sgd.PostLocalSGDState(None, None, 0), local_sgd.post_localSGD_hook)
    return optimizer._shared_work.options(optimizer.defaults)["process_group"] is not None


def loops():
    return (
        local_sgd_equals_training_alone(),
        ignored_parameter_is_every_ranks_own(),
        uneven_inputs_end(),
        hook_that_averages_later_trains_alone(),
    )


def test_loops_that_leave_ranks_apart_compute_on_every_rank():
    for local, ignored, uneven, is_on in run_ranks(loops, 2):
        assert local == 0
        assert ignored < 1e-12
        assert uneven < 1e-12
        assert not is_on


def unknown_differences():
    """Nobody told the optimizer of a DDP, and gradients differ: at the first step, or once, much later."""
    messages = []
    for moment in (0, STEPS_BETWEEN + 3):
        model = network()
        optimizer = build_normuon(model, process_group=dist.group.WORLD, **OPTIONS)
        for step in range(2 * STEPS_BETWEEN + 1):
            generator = torch.Generator().manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator).double()
                if step == moment and parameter is model[1].weight and dist.get_rank() == 1:
                    parameter.grad.mul_(1.5)
            before = copy.deepcopy(model)
            try:
                optimizer.step()
            except RuntimeError as error:
                assert difference(model, before) == 0
                messages.append((step, str(error)))
                break
    return messages


def test_a_difference_that_nobody_announced_is_named_on_all_ranks_before_a_write():
    for (first, gradient), (later, momentum) in run_ranks(unknown_differences, 2):
        assert first == 0
        assert later == 2 * STEPS_BETWEEN
        assert "'1.weight' has another gradient on rank 1 than on rank 0" in gradient
        assert "'1.weight' has another momentum on rank 1 than on rank 0" in momentum
        assert "replicas='redundant'" in gradient


@pytest.mark.parametrize("group", [None, "given"])
def test_lightning_and_fabric_keep_the_group_that_was_given(group):
    pytest.importorskip("lightning")
    from normuon_plugins.lightning.strategies import complete_options

    class DDPStrategy:
        pass

    assert complete_options({"process_group": group}, DDPStrategy(), None) == {"process_group": group}
