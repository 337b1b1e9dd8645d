"""The update rules one by one, where the golden ladder would not say which of them is wrong."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normuon_plugins.core.step_size import matrix_scale
from normuon_plugins.core.update_rules import nesterov_update, neuron_rms, neuron_scale, normuon_direction


def direction_of(update, adjust_lr_fn="match_rms_adamw", normalize=True, eps=1e-8):
    """Return the direction of matrices that count as orthogonalized, at their first step."""
    buffer = torch.zeros(*update.shape[:-1], 1)
    options = {"normalize": normalize, "beta2": 0.9, "eps": eps, "adjust_lr_fn": adjust_lr_fn}
    return normuon_direction(update, buffer, orthogonalize=torch.clone, **options)


@pytest.mark.parametrize("adjust_lr_fn", ["match_rms_adamw", "original"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("normalize", [True, False])
def test_zero_stays_zero_in_matrices_of_any_size(adjust_lr_fn, dtype, normalize):
    """From 400 entries on, the factor overflowed, and zero gradients at the first step made weights NaN."""
    zeros = torch.zeros(2, 64, 48, dtype=dtype)
    assert torch.equal(direction_of(zeros, adjust_lr_fn, normalize, eps=0.0).direction, zeros)
    tiny = torch.full((1, 64, 48), 1e-38, dtype=dtype)
    assert torch.isfinite(direction_of(tiny, adjust_lr_fn, normalize, eps=0.0).direction).all()


def test_rms_is_that_of_each_row():
    update = torch.randn(2, 3, 8, dtype=torch.bfloat16)
    torch.testing.assert_close(neuron_rms(update), update.float().square().mean(-1, keepdim=True).sqrt())


def test_rows_are_divided_by_their_running_rms():
    buffer = torch.full((2, 3, 1), 0.5)
    rms = torch.rand(2, 3, 1)
    before = rms.clone()
    scale = neuron_scale(rms, buffer, beta2=0.9, eps=1e-8)
    expected = 0.9 * 0.5 + 0.1 * before.square()
    torch.testing.assert_close(buffer, expected)
    torch.testing.assert_close(scale, 1 / (expected.sqrt() + 1e-8))
    assert torch.equal(rms, before)


@pytest.mark.parametrize("eps", [0.0, 1e-8])
@pytest.mark.parametrize("adjust_lr_fn", ["match_rms_adamw", "original"])
def test_a_row_of_zeros_stays_zero(eps, adjust_lr_fn):
    direction = direction_of(torch.tensor([[[0.0, 0.0], [1.0, 2.0]]]), adjust_lr_fn, eps=eps).direction
    assert torch.equal(direction[0, 0], torch.zeros(2))
    assert direction.isfinite().all()
    assert direction[0, 1].all()


def test_neuron_statistics_are_float32_for_bfloat16_updates():
    # 0.95 * v + 0.05 * u: in bfloat16 the second term would vanish beside the first after a few steps.
    buffer = torch.full((1, 1), 1.0)
    for _ in range(100):
        neuron_scale(neuron_rms(torch.full((1, 4), 0.99, dtype=torch.bfloat16)), buffer, beta2=0.95, eps=0.0)
    value = float(torch.tensor(0.99, dtype=torch.bfloat16)) ** 2
    assert buffer.item() == pytest.approx(value + (1 - value) * 0.95**100, rel=1e-5)


def test_wrong_buffer_shape_is_refused():
    with pytest.raises(ValueError, match=r"RMS \(3, 1\) need a second_momentum_buffer like it; got \(4, 1\)"):
        neuron_scale(torch.ones(3, 1), torch.ones(4, 1), beta2=0.9, eps=0.0)


@pytest.mark.parametrize("shape", [(1, 3, 12), (1, 12, 3), (2, 5, 5)])
@pytest.mark.parametrize("normalize", [True, False])
def test_directions_have_the_norms_of_the_table(shape, normalize):
    update = torch.randn(shape)
    m, n = shape[-2:]
    rms = direction_of(update, "match_rms_adamw", normalize).direction.square().mean((-2, -1)).sqrt()
    torch.testing.assert_close(rms, torch.full_like(rms, 0.2))
    size = direction_of(update, "original", normalize).direction.norm(dim=(-2, -1))
    torch.testing.assert_close(size, update.norm(dim=(-2, -1)) * max(1.0, m / n) ** 0.5)


@pytest.mark.parametrize("normalize", [True, False])
def test_scale_is_what_rows_were_multiplied_by(normalize):
    update = torch.randn(2, 4, 6)
    found = direction_of(update, normalize=normalize)
    torch.testing.assert_close(found.direction, update * found.scale)
    torch.testing.assert_close(found.rms, neuron_rms(update))


def test_unknown_scaling_is_refused_instead_of_meaning_one():
    with pytest.raises(ValueError, match="match_rms"):
        matrix_scale(torch.ones(2, 1), torch.ones(2, 1), 2, adjust_lr_fn="match_rms")


def test_nesterov_looks_ahead_with_the_same_gradient():
    momentum, gradient = torch.tensor([2.0]), torch.tensor([4.0])
    assert nesterov_update(momentum, gradient, momentum=0.75).item() == 0.75 * 2 + 0.25 * 4


@given(seed=st.integers(0, 1000), rows=st.integers(2, 6), cols=st.integers(2, 6))
@settings(max_examples=30, deadline=None)
def test_permuting_neurons_permutes_the_direction(seed, rows, cols):
    generator = torch.Generator().manual_seed(seed)
    update = torch.randn(1, rows, cols, generator=generator, dtype=torch.float64)
    order = torch.randperm(rows, generator=generator)
    first, second = (
        normuon_direction(
            u,
            torch.full((1, rows, 1), 0.1),
            orthogonalize=lambda x: x / x.norm(),
            normalize=True,
            beta2=0.9,
            eps=1e-8,
            adjust_lr_fn="original",
        ).direction
        for u in (update, update[:, order])
    )
    torch.testing.assert_close(second, first[:, order], rtol=1e-6, atol=1e-9)
