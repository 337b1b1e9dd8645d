"""Loops around FSDP2 as people write them, against the same loop in one process."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from normuon_plugins import build_normuon
from tests.models import whole
from tests.ranks import run_ranks


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.inner, self.last = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.last(self.inner(self.first(x)).tanh())


def network(sharded):
    model = Network().double()
    if sharded:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(model.inner, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def loss_of(model, step):
    return model(torch.full((2, 4), 0.1 * step + 0.5, dtype=torch.float64)).square().sum()


def optimizer_of(model):
    return build_normuon(model, lr=0.1, ns_dtype="float64")


def built_after_a_forward(model):
    """FSDP2's root keeps its parameters whole after a forward without backward: trainer.validate, then trainer.fit."""
    with torch.no_grad():
        loss_of(model, 9)
    optimizer = optimizer_of(model)
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


def evaluated_before_the_closure(model):
    """Lightning validates first, and always passes a closure."""
    optimizer = optimizer_of(model)
    for step in range(3):
        with torch.no_grad():
            loss_of(model, 9)

        def closure(step=step):
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            return loss

        optimizer.step(closure)


def frozen_before_the_step(model):
    """What has a gradient is stepped, also where it no longer requires one."""
    optimizer = optimizer_of(model)
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        model.inner.requires_grad_(step != 1)
        optimizer.step()
        model.inner.requires_grad_(True)


LOOPS = (built_after_a_forward, evaluated_before_the_closure, frozen_before_the_step)


def differences():
    found = {}
    for loop in LOOPS:
        sharded, single = network(True), network(False)
        start = [whole(parameter).clone() for parameter in single.parameters()]
        loop(sharded)
        loop(single)
        assert all(isinstance(parameter, DTensor) for parameter in optimizer_of(sharded).param_groups[0]["params"])
        pairs = list(zip(sharded.parameters(), single.parameters(), strict=True))
        moved = [not torch.equal(whole(parameter), before) for (parameter, _), before in zip(pairs, start, strict=True)]
        found[loop.__name__] = max((whole(a) - b).abs().max().item() for a, b in pairs), all(moved)
    return found


def test_every_loop_equals_one_process_and_moves_all_weights():
    for found in run_ranks(differences, 2):
        assert found.keys() == {loop.__name__ for loop in LOOPS}
        for name, (difference, moved) in found.items():
            assert difference < 1e-9, name
            assert moved, name
