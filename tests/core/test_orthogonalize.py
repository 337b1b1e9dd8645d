"""orthogonalize against SVD, against the iteration in float64, and at the ends of float32's range."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normuon_plugins.core.orthogonalize import PRESETS, fast_matmul_dtype, orthogonalize
from tests.reference import newton_schulz, polar_factor

SHAPES = [(16, 16), (12, 40), (40, 12), (1, 7), (7, 1), (3, 5, 8), (2, 3, 8, 5)]


@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_iteration_in_float64(shape):
    matrices = torch.randn(shape)
    expected = torch.stack([newton_schulz(matrix) for matrix in matrices.reshape(-1, *shape[-2:])]).reshape(shape)
    result = orthogonalize(matrices, ns_dtype=torch.float32)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_float64_products_match_to_float64_precision(shape):
    matrices = torch.randn(shape, dtype=torch.float64)
    expected = torch.stack([newton_schulz(matrix) for matrix in matrices.reshape(-1, *shape[-2:])]).reshape(shape)
    torch.testing.assert_close(orthogonalize(matrices, ns_dtype=torch.float64), expected, rtol=1e-11, atol=1e-12)


# Bands: the "muon" polynomial is not meant to converge, its author gives about [0.7, 1.2]; five Polar Express steps are
# optimal from 1e-3 up, and end within 15 % of one.
@pytest.mark.parametrize(("preset", "low", "high"), [("muon", 0.65, 1.22), ("polar_express", 0.85, 1.15)])
def test_singular_values_land_in_the_band_of_the_preset(preset, low, high):
    left, _, right = torch.linalg.svd(torch.randn(48, 64), full_matrices=False)
    spectrum = torch.logspace(-2, 0, 48)  # two decades
    matrix = left @ torch.diag(spectrum) @ right
    singular = torch.linalg.svdvals(orthogonalize(matrix, ns_coefficients=preset, ns_dtype=torch.float32))
    assert singular.min() > low
    assert singular.max() < high


def test_convergent_coefficients_reach_the_polar_factor():
    # (15/8, -10/8, 3/8): the classical quintic Newton-Schulz, which converges to the exact orthogonal factor.
    matrix = torch.randn(10, 20, dtype=torch.float64)
    result = orthogonalize(matrix, ns_coefficients=(1.875, -1.25, 0.375), ns_steps=40, ns_dtype=torch.float64)
    torch.testing.assert_close(result, polar_factor(matrix), rtol=1e-10, atol=1e-10)


def test_every_step_of_polar_express_uses_its_own_polynomial():
    matrix = torch.randn(6, 9, dtype=torch.float64)
    x = matrix / (1.02 * matrix.norm())
    for a, b, c in PRESETS["polar_express"].polynomials:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    result = orthogonalize(matrix, ns_coefficients="polar_express", ns_dtype=torch.float64)
    torch.testing.assert_close(result, x, rtol=1e-12, atol=1e-12)


@given(rows=st.integers(1, 9), cols=st.integers(1, 9), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_transposing_commutes(rows, cols, seed):
    matrix = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    result, transposed = (orthogonalize(m, ns_dtype=torch.float64) for m in (matrix, matrix.mT))
    torch.testing.assert_close(transposed, result.mT, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-10, 1e10, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_scale_gives_the_same_result(scale, dtype):
    matrix = torch.randn(6, 10).to(dtype)
    result = orthogonalize(matrix * scale, ns_dtype=torch.float32)
    assert result.isfinite().all()
    # 1e-38 is where float32 becomes subnormal: a few bits of the input are gone.
    torch.testing.assert_close(result, orthogonalize(matrix, ns_dtype=torch.float32), rtol=2e-2, atol=2e-3)


def test_zero_stays_zero_and_does_not_disturb_its_batch():
    matrices = torch.randn(3, 4, 6)
    alone = orthogonalize(matrices[2:], ns_dtype=torch.float32)
    matrices[1] = 0
    result = orthogonalize(matrices, ns_dtype=torch.float32)
    assert (result[1] == 0).all()
    torch.testing.assert_close(result[2:], alone)


def test_bfloat16_products_stay_within_their_rounding():
    matrix = torch.randn(24, 40)
    exact = orthogonalize(matrix, ns_dtype=torch.float32)
    rounded = orthogonalize(matrix, ns_dtype=torch.bfloat16)
    assert 0 < (rounded - exact).norm() / exact.norm() < 0.05


@pytest.mark.parametrize("turned", [False, True])
def test_the_result_may_take_the_place_of_the_input(turned):
    matrices = torch.randn(3, 6, 10)
    expected = orthogonalize(matrices, ns_dtype=torch.float32)
    stored = matrices.mT.contiguous().mT if turned else matrices
    result = orthogonalize(stored, ns_dtype=torch.float32, out=stored)
    assert result.data_ptr() == stored.data_ptr()
    torch.testing.assert_close(stored, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("view", [lambda x: x.mT, lambda x: x[:, :, ::2], lambda x: x.transpose(0, 1), lambda x: x[1:]])
def test_any_strides_give_the_same_result(view):
    matrices = view(torch.randn(3, 6, 10))
    expected = orthogonalize(matrices.contiguous(), ns_dtype=torch.float32)
    torch.testing.assert_close(orthogonalize(matrices, ns_dtype=torch.float32), expected, rtol=1e-5, atol=1e-6)


def test_input_is_not_modified_and_autocast_does_not_change_the_products():
    matrix = torch.randn(8, 8)
    before = matrix.clone()
    plain = orthogonalize(matrix, ns_dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(orthogonalize(matrix, ns_dtype=torch.float32), plain)
    assert torch.equal(matrix, before)


def test_dtype_follows_what_the_device_multiplies_fast(monkeypatch):
    assert fast_matmul_dtype(torch.device("cuda")) == torch.bfloat16
    for capabilities, expected in [
        ({"avx2": True}, torch.float32),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
        ({"amx_bf16": False, "avx512_bf16": False}, torch.float32),
    ]:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        assert fast_matmul_dtype(torch.device("cpu")) == expected


@pytest.mark.parametrize("bad", [torch.randn(4), torch.ones(3, 3, dtype=torch.int64), torch.ones(3, 3).cfloat()])
def test_what_is_no_real_matrix_is_refused(bad):
    with pytest.raises(ValueError, match="real matrices"):
        orthogonalize(bad)


@pytest.mark.parametrize("bad", ["moun", (1.0, 2.0)])
def test_unknown_coefficients_are_refused(bad):
    with pytest.raises(ValueError, match="ns_coefficients"):
        orthogonalize(torch.eye(2), ns_coefficients=bad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(11, 5), (3, 137), (67, 3), (14, 109), (48, 32), (515, 520)])
def test_a_matrix_rounds_alike_alone_and_anywhere_in_a_batch(dtype, shape):
    """MKL rounds by alignment: with odd sizes a step depended on which matrices shared a rank."""
    matrices = torch.randn(5, *shape).to(dtype)
    batch = orthogonalize(matrices, ns_dtype=dtype)
    for matrix, expected in zip(matrices, batch, strict=True):
        assert torch.equal(orthogonalize(matrix.clone(), ns_dtype=dtype), expected)
