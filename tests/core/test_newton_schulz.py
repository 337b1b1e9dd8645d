"""Every form of the iteration against the plain one in float64, its cost against the products that really run."""

import itertools

import pytest
import torch

from benchmarks.forms import iterate, structured, with_spectrum
from normuon_plugins.core.newton_schulz import SHARED_FROM, Form, Workspace, choose_form, newton_schulz
from normuon_plugins.core.orthogonalize import PRESETS, multiplications, orthogonalize
from tests.reference import newton_schulz as plain_iteration

MUON = PRESETS["muon"]
SEGMENTS = [(1, 1, 1, 1, 1), (3, 2), (2, 1, 2), (5,)]


def unit(matrix):
    return matrix / matrix.norm()


@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize("strips", [1, 2, 3, 5])
@pytest.mark.parametrize("shape", [(11, 11), (11, 30), (30, 11), (3, 4)])
def test_every_form_is_the_same_function(segments, strips, shape):
    matrix = unit(torch.randn(shape, dtype=torch.float64))
    expected = plain_iteration(matrix)
    torch.testing.assert_close(
        iterate(matrix[None], MUON.polynomials, Form(segments, strips))[0], expected, rtol=1e-10, atol=1e-11
    )


@pytest.mark.parametrize("segments", SEGMENTS)
def test_a_step_keeps_its_own_polynomial_where_a_gram_matrix_is_shared(segments):
    polynomials = PRESETS["polar_express"].polynomials
    matrix = unit(torch.randn(2, 6, 15, dtype=torch.float64))
    expected = matrix
    for a, b, c in polynomials:
        gram = expected @ expected.mT
        expected = a * expected + (b * gram + c * gram @ gram) @ expected
    torch.testing.assert_close(iterate(matrix, polynomials, Form(segments, 1)), expected, rtol=1e-9, atol=1e-10)


def test_what_strips_leave_out_is_mirrored_exactly():
    matrix = unit(torch.randn(1, 50, 70))
    seen = []

    class Watched(Workspace):
        def give(self, *tensors):
            seen.extend(tensor.clone() for tensor in tensors if tensor.shape == (1, 50, 50))
            super().give(*tensors)

    workspace = Watched(matrix.dtype, matrix.device)
    newton_schulz(matrix.clone(), MUON.polynomials, Form((3, 2), 3), workspace, torch.empty_like(matrix))
    assert len(seen) > 5
    for square in seen:
        for edge in (17, 34):  # strips of 17 columns
            assert torch.equal(square[:, :edge, edge:], square[:, edge:, :edge].mT)


def count_multiplications(monkeypatch, function):
    """Return how many scalar multiplications the products of a call take."""
    total = 0

    def counting(real):
        def product(added, left, right, **options):
            nonlocal total
            total += left.shape[:-2].numel() * left.shape[-2] * left.shape[-1] * right.shape[-1]
            return real(added, left, right, **options)

        return product

    with monkeypatch.context() as patch:
        for name in ("addmm", "baddbmm"):
            patch.setattr(torch, name, counting(getattr(torch, name)))
        function()
    return total


@pytest.mark.parametrize("preset", ["muon", "polar_express"])
@pytest.mark.parametrize("ns_steps", [1, 3, 5, 6])
@pytest.mark.parametrize("shape", [(3, 50), (50, 3), (130, 400), (200, 130), (512, 512), (768, 512)])
def test_the_cost_that_is_planned_is_the_cost_that_is_paid(monkeypatch, preset, ns_steps, shape):
    options = {"ns_coefficients": preset, "ns_steps": ns_steps}
    paid = count_multiplications(
        monkeypatch, lambda: orthogonalize(torch.randn(shape), **options, ns_dtype=torch.float32)
    )
    assert paid == multiplications(*shape, ns_steps, ns_coefficients=preset, device="cpu")


def test_no_form_that_is_allowed_would_cost_less():
    sides = (SHARED_FROM, 300, 768, 1024)
    for short, ratio, in_strips in itertools.product(sides, (1, 1.1, 1.3, 1.6, 4), (True, False)):
        long = int(short * ratio)
        chosen = choose_form(short, long, 5, MUON.shared, in_strips=in_strips)
        for segments in ((1,) * 5, (3, 2)):
            assert chosen.multiplications(short, long) <= Form(segments, chosen.strips).multiplications(short, long)


def test_a_wide_matrix_costs_two_thirds_of_the_plain_iteration_and_half_on_a_cpu():
    """768 x 3072: 45 products of 768 x 768 in the plain iteration."""
    unit_of_work = 768**3
    assert multiplications(768, 3072, 5, ns_coefficients="muon", device="cuda") == 30 * unit_of_work
    on_cpu = multiplications(768, 3072, 5, ns_coefficients="muon", device="cpu")
    assert on_cpu / unit_of_work == pytest.approx(8 + (8 + 14) * 2 / 3)


def test_small_matrices_and_other_presets_share_nothing():
    assert choose_form(SHARED_FROM - 1, 1000, 5, MUON.shared, in_strips=True).segments == (1,) * 5
    assert choose_form(768, 3072, 5, PRESETS["polar_express"].shared, in_strips=True).segments == (1,) * 5


def test_a_cpu_with_amx_multiplies_whole_products_in_batches(monkeypatch):
    matrices = torch.randn(2, 520, 520)
    expected = orthogonalize(matrices, ns_dtype=torch.bfloat16)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    found = []
    work = count_multiplications(monkeypatch, lambda: found.append(orthogonalize(matrices, ns_dtype=torch.bfloat16)))
    assert work == 2 * 15 * 520**3
    torch.testing.assert_close(found[0], expected, rtol=0.1, atol=0.01)


def test_muons_coefficients_written_as_numbers_are_the_same_preset():
    by_name, by_numbers = (
        multiplications(768, 3072, 5, ns_coefficients=coefficients, device="cpu")
        for coefficients in ("muon", MUON.polynomials[0])
    )
    assert by_numbers == by_name


@pytest.mark.parametrize("rows", [SHARED_FROM, 160])
def test_bfloat16_stays_in_the_band_on_ill_conditioned_matrices(rows):
    """The band of the plain iteration: its polynomial takes no singular value of [0, 1] past 1.21."""
    for name, matrix in structured(rows, 2 * rows):
        result = orthogonalize(matrix, ns_dtype=torch.bfloat16)
        assert torch.linalg.svdvals(result.double()).max() < 1.23, name


def test_sharing_costs_no_accuracy_in_bfloat16():
    """Against the exact iteration; the plain one in bfloat16 is what every other implementation runs."""
    for name, matrix in structured(SHARED_FROM, 320):
        start = unit(matrix.double())
        exact = plain_iteration(start)
        shared, plain = (
            (iterate(start.bfloat16()[None], MUON.polynomials, Form(segments, 1))[0].double() - exact).norm()
            / exact.norm()
            for segments in ((3, 2), (1,) * 5)
        )
        assert shared < max(1.25 * plain, 0.04), name


def test_singular_vectors_are_those_of_the_matrix():
    """Every singular value of the result is the polynomial of one of the input, along the same vectors (SVD)."""
    matrix = with_spectrum(torch.logspace(0, -2, SHARED_FROM), 300)
    left, spectrum, right = torch.linalg.svd(unit(matrix), full_matrices=False)
    for _ in range(5):
        spectrum = 3.4445 * spectrum - 4.7750 * spectrum**3 + 2.0315 * spectrum**5
    result = orthogonalize(matrix, ns_dtype=torch.float32).double()
    along = left.mT @ result @ right.mT
    torch.testing.assert_close(along.diagonal(), spectrum, rtol=0, atol=2e-4)
    assert (along - torch.diag(along.diagonal())).abs().max() < 2e-4
