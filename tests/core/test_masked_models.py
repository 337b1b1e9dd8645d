"""What docs/plan.md says of pruned, parametrized and masked models."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from normuon_plugins import build_normuon, plan_parameters


class Masked(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight):
        return weight * self.mask


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8, bias=False), nn.Tanh(), nn.Linear(8, 8, bias=False))


def entries():
    return (torch.rand(8, 8, generator=torch.Generator().manual_seed(1)) > 0.5).float()


def rows_and_columns():
    mask = torch.ones(8, 8)
    mask[[1, 5]], mask[:, 3] = 0, 0
    return mask


REWRITTEN = {
    "pruned": (lambda layer: prune.custom_from_mask(layer, "weight", entries()), ["weight_orig"]),
    "parametrized": (
        lambda layer: parametrize.register_parametrization(layer, "weight", Masked(entries())),
        ["parametrizations.weight.original"],
    ),
    "spectral norm": (parametrizations.spectral_norm, ["parametrizations.weight.original"]),
    "weight norm": (
        parametrizations.weight_norm,
        ["parametrizations.weight.original0", "parametrizations.weight.original1"],
    ),
}


@pytest.mark.parametrize("kind", REWRITTEN)
def test_what_a_weight_is_computed_from_stays_on_adamw_unless_an_override_says_otherwise(kind):
    rewrite, names = REWRITTEN[kind]
    network = model()
    rewrite(network[0])
    plan = plan_parameters(network)
    assert [row.name for row in plan if row.algorithm == "adamw"] == [f"0.{name}" for name in names]
    matrix = f"0.{names[-1]}"
    assert plan_parameters(network, overrides={f"^{matrix}$": "o i"})[matrix].algorithm == "normuon"


def train(network, mask, after=lambda weight: None, **options):
    """Train with a mask that was applied once and to every gradient; return the largest entry that it should hide."""
    weight = network[0].weight
    with torch.no_grad():
        weight.mul_(mask)
    weight.register_hook(lambda gradient: gradient * mask)
    optimizer = build_normuon(network, lr=1e-2, **options)
    for step in range(5):
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (network(x) - x).square().mean().backward()
        optimizer.step()
        after(weight)
    return float((weight.detach() * (1 - mask)).abs().max())


def test_an_entrywise_mask_does_not_survive_an_orthogonalized_update_and_rows_and_columns_do():
    assert train(model(), entries()) > 1e-3
    assert train(model(), rows_and_columns()) == 0.0


def test_remedies_of_an_entrywise_mask():
    assert train(model(), entries(), overrides={r"^0\.weight": "adamw"}) == 0.0
    assert train(model(), entries(), after=lambda weight: weight.data.mul_(entries())) == 0.0
