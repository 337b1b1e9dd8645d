"""Lazy layers: refused by name before their first batch, and after it what the same layers are without being lazy."""

import pytest
import torch
from torch import nn

from normuon_plugins import NorMuon, build_normuon, plan_parameters


def lazy():
    return nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(3))


@pytest.mark.parametrize("make", [build_normuon, plan_parameters])
def test_a_model_that_saw_no_batch_is_told_to_see_one(make):
    message = r"'0\.weight' of a lazy layer has no shape yet; run one batch through the model first"
    with pytest.raises(ValueError, match=message):
        make(lazy())


def test_after_a_batch_it_is_planned_as_if_it_had_never_been_lazy():
    model = lazy()
    model(torch.randn(4, 5))
    written_out = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    assert plan_parameters(model).to_dict() == plan_parameters(written_out).to_dict()


def test_groups_made_by_hand_take_lazy_parameters_on_adamw_as_torch_does():
    model, twin = nn.LazyLinear(3), nn.LazyLinear(3)
    with pytest.raises(ValueError, match=r"'weight' of a lazy layer has no shape yet"):
        NorMuon([("weight", model.weight)])
    optimizers = (
        NorMuon([{"params": list(model.named_parameters()), "algorithm": "adamw", "betas": (0.9, 0.999)}], lr=0.1),
        torch.optim.AdamW(twin.parameters(), lr=0.1, weight_decay=0.0, fused=True),
    )
    for layer, optimizer in zip((model, twin), optimizers, strict=True):
        layer(torch.zeros(2, 4))
        with torch.no_grad():
            layer.weight.fill_(1.0)
            layer.bias.fill_(0.0)
        layer(torch.arange(8.0).view(2, 4)).sin().sum().backward()
        optimizer.step()
    assert torch.equal(model.weight, twin.weight)
    assert torch.equal(model.bias, twin.bias)
