"""Cautious weight decay (arXiv 2510.12402) against a formula in float64, and off by default."""

import pytest
import torch

from normuon_plugins import NorMuon
from tests.reference import ReferenceNorMuon, newton_schulz

SHAPE = (6, 9)
DECAY = {"lr": 0.1, "weight_decay": 0.5}
OPTIONS = {**DECAY, "momentum": 0.9, "beta2": 0.8, "eps": 1e-8}


def start():
    """Weights of both signs, and exact zeros."""
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    weight[0, :3] = 0.0
    return weight


def gradients(step):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(100 + step))


class CautiousReference(ReferenceNorMuon):
    """The paper's step, but no decay where the step takes an entry away from zero."""

    def step(self, gradient):
        before, decay = self.weight.clone(), self.weight_decay
        self.weight_decay = 0.0
        super().step(gradient)
        self.weight_decay = decay
        step = before - self.weight
        self.weight = torch.where(before * step >= 0, self.weight - self.lr * decay * before, self.weight)


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["float", "tensor"])
@pytest.mark.parametrize("momentum_dtype", [None, "bfloat16"])
def test_decays_only_where_the_step_shrinks_the_weight(lr, momentum_dtype):
    weight = torch.nn.Parameter(start())
    options = {**OPTIONS, "lr": lr, "ns_dtype": "float64", "momentum_dtype": momentum_dtype}
    optimizer = NorMuon([weight], **options, cautious_weight_decay=True)
    spelled = {"nesterov": False, "normalize": True, "scaling": "match_rms_adamw", "orthogonalize": newton_schulz}
    reference = CautiousReference(start(), **OPTIONS, **spelled)
    for step in range(4):
        weight.grad = gradients(step)
        optimizer.step()
        reference.step(gradients(step))
    tolerance = 1e-6 if momentum_dtype is None else 0.02
    assert (weight.detach().double() - reference.weight).norm() / reference.weight.norm() < tolerance


def test_is_off_by_default_and_makes_a_difference():
    moved = {}
    for name, options in {
        "default": {},
        "off": {"cautious_weight_decay": False},
        "on": {"cautious_weight_decay": True},
    }.items():
        weight = torch.nn.Parameter(start())
        optimizer = NorMuon([weight], **DECAY, **options)
        weight.grad = gradients(0)
        optimizer.step()
        moved[name] = weight.detach()
    assert torch.equal(moved["default"], moved["off"])
    assert not torch.equal(moved["off"], moved["on"])


def test_without_decay_it_changes_nothing():
    moved = []
    for cautious in (False, True):
        weight = torch.nn.Parameter(start())
        optimizer = NorMuon([weight], lr=0.1, weight_decay=0.0, cautious_weight_decay=cautious)
        weight.grad = gradients(0)
        optimizer.step()
        moved.append(weight.detach())
    assert torch.equal(*moved)


def test_compensated_bfloat16_weights_decay_like_float32_ones():
    found = []
    for dtype, options in ((torch.float32, {}), (torch.bfloat16, {"kahan_sum": True})):
        weight = torch.nn.Parameter(start().to(torch.bfloat16).to(dtype))
        optimizer = NorMuon(
            [weight], lr=1e-3, weight_decay=0.5, cautious_weight_decay=True, ns_dtype="float32", **options
        )
        for step in range(20):
            weight.grad = gradients(step).to(torch.bfloat16).to(dtype)
            optimizer.step()
        found.append(weight.detach().double())
    assert (found[0] - found[1]).norm() / found[0].norm() < 5e-3
