"""The update rules one by one, where the golden ladder would not say which of them is wrong."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normuon_plugins.core.update_rules import nesterov_update, normalize_neurons, normuon_direction, rescale


@pytest.mark.parametrize("adjust_lr_fn", ["match_rms_adamw", "original"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rescale_leaves_zero_at_zero_for_matrices_of_any_size(adjust_lr_fn, dtype):
    """From 400 entries on, the factor overflowed, and zero gradients at the first step made weights NaN."""
    zeros = torch.zeros(2, 64, 48, dtype=dtype)
    assert torch.equal(rescale(zeros.clone(), zeros, adjust_lr_fn=adjust_lr_fn), zeros)
    tiny = torch.full((1, 64, 48), 1e-38, dtype=dtype)
    assert torch.isfinite(rescale(tiny.clone(), tiny, adjust_lr_fn=adjust_lr_fn)).all()


def test_rows_are_divided_by_their_running_rms():
    buffer = torch.full((2, 3, 1), 0.5)
    update = torch.randn(2, 3, 8)
    before = update.clone()
    result = normalize_neurons(update, buffer, beta2=0.9, eps=1e-8)
    expected = 0.9 * 0.5 + 0.1 * before.square().mean(-1, keepdim=True)
    torch.testing.assert_close(buffer, expected)
    torch.testing.assert_close(result, before / (expected.sqrt() + 1e-8))
    assert torch.equal(update, before)


@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_a_row_of_zeros_stays_zero(eps):
    update = torch.tensor([[0.0, 0.0], [1.0, 2.0]])
    result = normalize_neurons(update, torch.zeros(2, 1), beta2=0.95, eps=eps)
    assert torch.equal(result[0], torch.zeros(2))
    assert result.isfinite().all()


def test_neuron_statistics_are_float32_for_bfloat16_updates():
    # 0.95 * v + 0.05 * u: in bfloat16 the second term would vanish beside the first after a few steps.
    buffer = torch.full((1, 1), 1.0)
    for _ in range(100):
        normalize_neurons(torch.full((1, 4), 0.99, dtype=torch.bfloat16), buffer, beta2=0.95, eps=0.0)
    value = float(torch.tensor(0.99, dtype=torch.bfloat16)) ** 2
    assert buffer.item() == pytest.approx(value + (1 - value) * 0.95**100, rel=1e-5)


def test_wrong_buffer_shape_is_refused():
    with pytest.raises(ValueError, match=r"needs a second_momentum_buffer \(3, 1\)"):
        normalize_neurons(torch.ones(3, 4), torch.ones(4, 1), beta2=0.9, eps=0.0)


@pytest.mark.parametrize("shape", [(3, 12), (12, 3), (2, 5, 5)])
def test_rescale_gives_the_norms_of_the_table(shape):
    normalized, orthogonalized = torch.randn(shape), torch.randn(shape)
    m, n = shape[-2:]
    norms = orthogonalized.norm(dim=(-2, -1))
    rms = rescale(normalized.clone(), orthogonalized, adjust_lr_fn="match_rms_adamw").square().mean((-2, -1)).sqrt()
    torch.testing.assert_close(rms, torch.full_like(rms, 0.2))
    size = rescale(normalized.clone(), orthogonalized, adjust_lr_fn="original").norm(dim=(-2, -1))
    torch.testing.assert_close(size, norms * max(1.0, m / n) ** 0.5)


def test_unknown_scaling_is_refused_instead_of_meaning_one():
    with pytest.raises(ValueError, match="match_rms"):
        rescale(torch.ones(2, 2), torch.ones(2, 2), adjust_lr_fn="match_rms")


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
        )
        for u in (update, update[:, order])
    )
    torch.testing.assert_close(second, first[:, order], rtol=1e-6, atol=1e-9)
