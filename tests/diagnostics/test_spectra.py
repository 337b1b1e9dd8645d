"""The numbers of a diagnosis, against the step itself, against float64, and against matrices that stand alone."""

import math

import pytest
import torch

from normuon_plugins import NorMuon
from normuon_plugins.diagnostics import diagnose
from normuon_plugins.diagnostics.spectra import DEAD, DOMINANT, Stage, diagnose_matrix, diagnose_parameter
from tests.reference import newton_schulz

OPTIONS = {
    "layout": "o i",
    "normalize_neurons": True,
    "adjust_lr_fn": "match_rms_adamw",
    "eps": 1e-8,
    "ns_coefficients": "muon",
    "ns_steps": 5,
    "ns_dtype": "float32",
}


def stepped(weights, steps=3, seed=0, **options):
    """Return NorMuon after some steps with random gradients, rows over two decades, and what the last one did."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = NorMuon(
        weights, **{"lr": 1.0, "weight_decay": 0.0, "nesterov": False, "ns_dtype": "float32", **options}
    )
    for _ in range(steps):
        moved = []
        for parameter in [parameter for group in optimizer.param_groups for parameter in group["params"]]:
            scales = torch.logspace(-1, 1, parameter.shape[0]).view(-1, *[1] * (parameter.ndim - 1))
            parameter.grad = torch.randn(parameter.shape, generator=generator) * scales
            moved.append(parameter.detach().clone())
        optimizer.step()
    after = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return optimizer, [before - parameter.detach() for before, parameter in zip(moved, after, strict=True)]


def assert_shows(stage, matrix):
    """Assert that a stage has the singular values and neuron norms of ``matrix``, by numpy in float64."""
    exact = matrix.double()
    values = torch.linalg.svd(exact).S
    torch.testing.assert_close(stage.singular_values.double(), values, rtol=1e-4, atol=1e-5 * float(values[0]))
    torch.testing.assert_close(stage.neuron_norms.double(), (exact**2).sum(1).sqrt(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("adjust_lr_fn", ["match_rms_adamw", "original", "match_progress_adamw"])
@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (7, 7)])
def test_last_stage_is_what_the_step_added_to_the_weight(shape, adjust_lr_fn):
    """With lr=1 and no decay the weight moves by the direction."""
    weight = torch.nn.Parameter(torch.zeros(shape))
    optimizer, (moved,) = stepped([("weight", weight)], adjust_lr_fn=adjust_lr_fn)
    (found,) = diagnose(optimizer).matrices
    assert (found.name, found.shape) == ("weight", shape)
    assert_shows(found.stages["normuon"], moved)


def test_right_after_a_step_the_look_ahead_is_that_of_the_step():
    weight = torch.nn.Parameter(torch.zeros(10, 6))
    optimizer, (moved,) = stepped([("weight", weight)], nesterov=True)
    exact = diagnose(optimizer, gradients=True)
    assert_shows(exact.matrices[0].stages["normuon"], moved)
    assert not exact.notes
    guessed = diagnose(optimizer)
    assert "momentum stands for what was orthogonalized" in guessed.notes[0]
    assert guessed.to_dict()["matrices"][0]["muon"] != exact.to_dict()["matrices"][0]["muon"]


def test_muon_stage_is_what_a_step_without_the_neuron_step_adds():
    weight = torch.nn.Parameter(torch.zeros(10, 6))
    optimizer, (moved,) = stepped([("weight", weight)], normalize_neurons=False)
    (found,) = diagnose(optimizer).matrices
    assert list(found.stages) == ["momentum", "muon"]
    assert_shows(found.stages["muon"], moved)


def test_stages_of_a_matrix_are_the_papers():
    generator = torch.Generator().manual_seed(1)
    momentum = torch.randn(8, 12, generator=generator) * torch.logspace(-2, 0, 8)[:, None]
    second = torch.rand(8, 1, generator=generator) + 0.1
    found = diagnose_matrix("w", momentum, momentum, second, OPTIONS)
    muon = newton_schulz(momentum)
    normuon = muon / second.double().sqrt()
    for stage, matrix in (("momentum", momentum.double()), ("muon", muon), ("normuon", normuon)):
        exact = Stage(torch.linalg.svd(matrix).S, (matrix**2).sum(1).sqrt())
        shown = found.stages[stage]
        assert shown.condition_number == pytest.approx(exact.condition_number, rel=1e-3)
        assert shown.neuron_spread == pytest.approx(exact.neuron_spread, rel=1e-4)
        assert shown.stable_rank == pytest.approx(exact.stable_rank, rel=1e-4)


def test_scale_of_the_gradient_does_not_matter():
    momentum = torch.randn(5, 9, generator=torch.Generator().manual_seed(2))
    usual, tiny = (diagnose_matrix("w", *[momentum * scale] * 2, torch.ones(5, 1), OPTIONS) for scale in (1.0, 1e-30))
    for name, stage in usual.stages.items():
        torch.testing.assert_close(stage.singular_values, tiny.stages[name].singular_values, rtol=1e-4, atol=1e-6)


def test_dead_and_dominant_neurons_are_counted():
    momentum = torch.ones(100, 4)
    momentum[:3] *= DEAD / 2
    momentum[50] *= 2 * DOMINANT
    stage = diagnose_matrix("w", momentum, momentum, torch.ones(100, 1), OPTIONS).stages["momentum"]
    assert (stage.dead, stage.dominant) == (3, 1)


def test_rank_and_an_infinite_condition_number():
    momentum = torch.outer(torch.arange(1.0, 7.0), torch.ones(5)) + torch.eye(6, 5)[:, :1] @ torch.eye(5)[:1]
    found = diagnose_matrix("w", momentum, momentum, torch.ones(6, 1), OPTIONS)
    assert found.stages["momentum"].rank == 2
    assert math.isinf(found.stages["momentum"].condition_number)
    assert found.to_dict()["momentum"]["condition_number"] is None


@pytest.mark.parametrize(("value", "words"), [(0.0, "never had a gradient"), (float("nan"), "NaN")])
def test_what_cannot_be_decomposed_says_why(value, words):
    found = diagnose_matrix("w", *[torch.full((3, 4), value)] * 2, torch.zeros(3, 1), OPTIONS)
    assert not found.stages
    assert words in found.trouble


# layout -> shape of the parameter, and its matrices as a function of the whole tensor
LAYOUTS = {
    "i o": ((6, 8), lambda t: [t.T]),
    "o i i": ((6, 4, 3), lambda t: [t.reshape(6, 12)]),
    "e o i": ((3, 5, 6), lambda t: list(t)),
    "e i o": ((3, 6, 5), lambda t: [matrix.T for matrix in t]),
    "o=4+2+3 i": ((9, 5), lambda t: [t[:4], t[4:6], t[6:]]),
    "o%2+1 i": ((12, 4), lambda t: [t[[0, 1, 3, 4, 6, 7, 9, 10]], t[[2, 5, 8, 11]]]),
    "e i o%1+1": ((2, 4, 6), lambda t: [matrix.T[start::2] for start in (0, 1) for matrix in t]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read_as_its_matrices(layout):
    shape, matrices = LAYOUTS[layout]
    weight = torch.nn.Parameter(torch.zeros(shape))
    groups = [{"params": [("weight", weight)], "layout": layout}]
    optimizer, (moved,) = stepped(groups)
    found = diagnose(optimizer, per_parameter=99).matrices
    expected = matrices(moved)
    assert len(found) == len(expected)
    for one, matrix in zip(found, expected, strict=True):
        assert one.shape == tuple(matrix.shape)
        assert_shows(one.stages["normuon"], matrix)


def test_of_many_matrices_some_are_looked_at_evenly():
    momentum = torch.randn(9, 4, 5, generator=torch.Generator().manual_seed(3))
    group = {**OPTIONS, "layout": "e o i"}
    found = list(diagnose_parameter("experts", momentum, torch.ones(9, 4, 1), group, per_parameter=3))
    assert [matrix.name for matrix in found] == [f"experts [matrix {number}]" for number in (0, 4, 8)]


@pytest.mark.parametrize("momentum_dtype", ["bfloat16", "int8"])
def test_momentum_in_fewer_bits_is_read(momentum_dtype):
    weight = torch.nn.Parameter(torch.zeros(6, 300))
    optimizer, _ = stepped([("weight", weight)], momentum_dtype=momentum_dtype)
    full, _ = stepped([("weight", torch.nn.Parameter(torch.zeros(6, 300)))])
    ours, theirs = (diagnose(each).matrices[0].stages["momentum"] for each in (optimizer, full))
    relative = [stage.singular_values / stage.singular_values[0] for stage in (ours, theirs)]
    torch.testing.assert_close(*relative, rtol=0.05, atol=0.01)


def test_users_own_orthogonalization_is_what_is_shown():
    weight = torch.nn.Parameter(torch.zeros(4, 6))
    optimizer, (moved,) = stepped([("weight", weight)], orthogonalize_fn=torch.sign)
    assert_shows(diagnose(optimizer).matrices[0].stages["normuon"], moved)


def test_a_diagnosis_changes_nothing():
    weight = torch.nn.Parameter(torch.randn(4, 6))
    optimizer, _ = stepped([("weight", weight)])
    before = {key: value.clone() for key, value in optimizer.state[weight].items()}
    other = torch.nn.Parameter(torch.zeros(2, 2))
    optimizer.add_param_group({"params": [("later", other)]})
    diagnose(optimizer)
    assert other not in optimizer.state
    assert all(torch.equal(before[key], value) for key, value in optimizer.state[weight].items())


def test_before_the_first_step_there_is_nothing_to_see():
    with pytest.raises(ValueError, match="take a step first"):
        diagnose(NorMuon([torch.nn.Parameter(torch.zeros(2, 3))]))


def test_another_optimizer_is_refused():
    with pytest.raises(TypeError, match="SGD"):
        diagnose(torch.optim.SGD([torch.nn.Parameter(torch.zeros(2, 3))]))
