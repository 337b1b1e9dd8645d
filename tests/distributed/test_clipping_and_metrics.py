"""clip_grad_norm_ and the synchronized metrics on every mesh: what torch finds, and what one process finds."""

import math

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from normuon_plugins import clip_grad_norm_
from tests.distributed import cases
from tests.ranks import run_ranks

ORDERS = (2.0, 1.0, math.inf)


def gradients(model):
    return {name.split(".")[-1]: cases.gathered(p.grad) for name, p in model.named_parameters()}


def difference(found, expected):
    return max(float((found[name] - value).norm() / value.norm()) for name, value in expected.items())


def compare():
    """Return, by way: how far norm and clipped gradients are from torch's, and metrics from one process's."""
    found = {}
    for way, make in cases.ways().items():
        for order in ORDERS:
            model, plain = make(), cases.plain()
            for each in (model, plain):
                draw(each)
            expected = nn.utils.clip_grad_norm_(plain.parameters(), 0.5, norm_type=order)
            norm = clip_grad_norm_(model.parameters(), 0.5, norm_type=order)
            found[way, order] = {
                "dtensors": all(isinstance(p.grad, DTensor) for p in model.parameters()),
                "plain norm": not isinstance(norm, DTensor),
                "norm": abs(norm.item() / expected.item() - 1),
                "gradients": difference(gradients(model), gradients(plain)),
            }
        found[way, "metrics"] = metrics(make()), metrics(cases.plain())
    return found


def draw(model):
    for name, parameter in model.named_parameters():
        parameter.grad = cases.place_like(cases.tensors(1)[name.split(".")[-1]], parameter)


def metrics(model):
    optimizer = cases.optimizer_of(model.named_parameters())
    cases.steps(model, optimizer, 0, 2)
    return optimizer.metrics(synchronize=True)


@pytest.fixture(scope="module")
def found():
    first, *others = run_ranks(compare, 4)
    for other in others:
        assert other == first
    return first


def test_every_way_has_dtensors_and_a_plain_norm(found):
    for key, facts in found.items():
        if key[1] != "metrics":
            assert facts["dtensors"], key
            assert facts["plain norm"], key
    assert "expert parallel" in {way for way, _ in found}


def test_norm_is_that_of_torch_on_one_process(found):
    for key, facts in found.items():
        if key[1] != "metrics":
            assert facts["norm"] < 1e-6, key


def test_gradients_are_scaled_like_those_of_torch(found):
    for key, facts in found.items():
        if key[1] != "metrics":
            assert facts["gradients"] < 1e-6, key


def test_metrics_are_those_of_one_process(found):
    for key, facts in found.items():
        if key[1] == "metrics":
            assert facts[0] == pytest.approx(facts[1], rel=1e-5), key


def test_small_gradients_stay_bitwise():
    weight = nn.Parameter(torch.zeros(3))
    weight.grad = torch.tensor([0.1, 0.2, 0.2])
    norm = clip_grad_norm_(weight, 1.0)
    assert norm.item() == pytest.approx(0.3)
    assert torch.equal(weight.grad, torch.tensor([0.1, 0.2, 0.2]))


def test_without_a_gradient_the_norm_is_zero():
    assert clip_grad_norm_([nn.Parameter(torch.zeros(3))], 1.0).item() == 0
    assert clip_grad_norm_([], 1.0).item() == 0


def test_a_norm_that_is_not_finite_is_refused_on_request_before_any_scaling():
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([torch.inf, 1.0])
    with pytest.raises(RuntimeError, match=r"norm of order 2\.0 is inf; nothing was clipped"):
        clip_grad_norm_(weight, 1.0, error_if_nonfinite=True)
    assert torch.equal(weight.grad, torch.tensor([torch.inf, 1.0]))
    clip_grad_norm_(weight, 1.0)
    assert weight.grad[1] == 0


def test_an_order_that_is_no_norm_is_refused():
    with pytest.raises(ValueError, match=r"norm_type=0 must be above 0"):
        clip_grad_norm_(nn.Parameter(torch.zeros(2)), 1.0, norm_type=0)
