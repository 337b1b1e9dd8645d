"""The golden ladder: NorMuon against code that is not ours, from the tightest comparison to the widest."""

import pytest
import torch
from torch.optim._muon import _zeropower_via_newtonschulz

from normuon_plugins import NorMuon
from normuon_plugins.core.orthogonalize import orthogonalize
from tests.reference import ReferenceNorMuon, newton_schulz

STEPS = 20
# layout, shape, and where matrix k of the parameter lies; each shape for a reason
CASES = {
    "tall": ("o i", (24, 10), lambda w: [w]),
    "wide": ("o i", (10, 24), lambda w: [w]),
    "square": ("o i", (16, 16), lambda w: [w]),
    "transposed": ("i o", (12, 20), lambda w: [w.T]),
    "convolution": ("o i i i", (8, 3, 2, 2), lambda w: [w.flatten(1)]),
    "experts": ("e o i", (3, 8, 12), list),
    "transposed experts": ("e i o", (3, 8, 12), lambda w: [expert.T for expert in w]),
    "fused blocks": ("o=8+4+4 i", (16, 10), lambda w: [w[:8], w[8:12], w[12:]]),
    "interleaved blocks": ("o%2+2 i", (8, 10), lambda w: [w[[0, 1, 4, 5]], w[[2, 3, 6, 7]]]),
    "transposed interleaved experts": (
        "e i o%1+1",
        (2, 10, 8),
        lambda w: [half for expert in w for half in (expert.T[::2], expert.T[1::2])],
    ),
}
OPTIONS = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9, "beta2": 0.8, "eps": 1e-8}


def gradients(shape, step):
    """Return a gradient whose rows differ in scale by two decades, so that the neuron step has work to do."""
    generator = torch.Generator().manual_seed(step)
    scales = torch.logspace(-2, 0, shape[0]).view(-1, *[1] * (len(shape) - 1))
    return torch.randn(shape, generator=generator) * scales


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("adjust_lr_fn", ["match_rms_adamw", "original", "match_progress_adamw"])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("normalize", [True, False])
def test_matches_the_paper_in_float64(case, adjust_lr_fn, nesterov, normalize):
    layout, shape, matrices = CASES[case]
    initial = torch.randn(shape) * 0.1
    parameter = torch.nn.Parameter(initial.clone())
    group = {"params": [parameter], "layout": layout}
    optimizer = NorMuon(
        [group],
        **OPTIONS,
        nesterov=nesterov,
        adjust_lr_fn=adjust_lr_fn,
        normalize_neurons=normalize,
        ns_dtype="float64",
    )
    reference = [
        ReferenceNorMuon(
            matrix,
            **OPTIONS,
            nesterov=nesterov,
            normalize=normalize,
            scaling=adjust_lr_fn,
            orthogonalize=newton_schulz,
        )
        for matrix in matrices(initial)
    ]
    for step in range(STEPS):
        parameter.grad = gradients(shape, step)
        before = parameter.grad.clone()
        optimizer.step()
        assert torch.equal(parameter.grad, before)
        for oracle, gradient in zip(reference, matrices(parameter.grad), strict=True):
            oracle.step(gradient)
    for oracle, matrix in zip(reference, matrices(parameter.detach()), strict=True):
        assert (matrix.double() - oracle.weight).norm() / oracle.weight.norm() < 1e-6


@pytest.mark.parametrize("shape", [(24, 10), (10, 24), (16, 16)])
def test_default_float32_products_match_the_paper_too(shape):
    initial = torch.randn(shape) * 0.1
    parameter = torch.nn.Parameter(initial.clone())
    optimizer = NorMuon([parameter], **OPTIONS, nesterov=False, ns_dtype="float32")
    oracle = ReferenceNorMuon(
        initial,
        **OPTIONS,
        nesterov=False,
        normalize=True,
        scaling="match_rms_adamw",
        orthogonalize=newton_schulz,
    )
    for step in range(STEPS):
        parameter.grad = gradients(shape, step)
        optimizer.step()
        oracle.step(parameter.grad)
    assert (parameter.double() - oracle.weight).norm() / oracle.weight.norm() < 2e-5


@pytest.mark.parametrize("shape", [(6, 9), (9, 9)])
def test_without_orthogonalization_and_neurons_it_is_sgd_bitwise(shape):
    # "original" scales by sqrt(max(1, m / n)), which is 1 here; momentum 0 leaves the gradient itself.
    ours, theirs = (torch.nn.Parameter(torch.ones(shape)) for _ in range(2))
    options = {"momentum": 0.0, "weight_decay": 0.0, "normalize_neurons": False, "adjust_lr_fn": "original"}
    optimizers = [
        NorMuon([ours], lr=0.1, ns_dtype="float32", orthogonalize_fn=torch.clone, **options),
        torch.optim.SGD([theirs], lr=0.1),
    ]
    for step in range(5):
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = gradients(shape, step)
            optimizer.step()
    assert torch.equal(ours, theirs)


def torch_newton_schulz(matrices):
    """torch.optim.Muon's own orthogonalization, one matrix at a time, in bfloat16 as it insists."""
    return torch.stack([_zeropower_via_newtonschulz(m, (3.4445, -4.7750, 2.0315), 5, 1e-7) for m in matrices]).float()


# With torch's orthogonalization inside, the rest must agree to float32; with our own in bfloat16, to its rounding,
# which depends on whether matrices are batched.
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [({"ns_dtype": "float32", "orthogonalize_fn": torch_newton_schulz}, 1e-6), ({"ns_dtype": "bfloat16"}, 0.02)],
)
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("shape", [(24, 10), (10, 24), (16, 16)])
def test_without_neurons_it_is_torch_muon(shape, nesterov, options, tolerance):
    ours, theirs = (torch.nn.Parameter(torch.ones(shape)) for _ in range(2))
    shared = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9, "nesterov": nesterov, "adjust_lr_fn": "original"}
    optimizers = [NorMuon([ours], **shared, normalize_neurons=False, **options), torch.optim.Muon([theirs], **shared)]
    for step in range(STEPS):
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = gradients(shape, step)
            optimizer.step()
    moved = (theirs - torch.ones(shape)).norm()
    assert (ours - theirs).norm() / moved < tolerance


@pytest.mark.parametrize("fused", [True, False])
def test_adamw_groups_are_torch_adamw(fused):
    shapes = [(5,), (4, 6), (), (2, 3, 4)]
    ours, theirs = ([torch.nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
    matrix = torch.nn.Parameter(torch.eye(3))
    groups = [{"params": [matrix]}, {"params": ours, "algorithm": "adamw", "weight_decay": 0.05}]
    optimizers = [
        NorMuon(groups, lr=1.0, adamw_lr=0.02, adamw_betas=(0.8, 0.9), adamw_eps=1e-7),
        torch.optim.AdamW(theirs, lr=0.02, betas=(0.8, 0.9), eps=1e-7, weight_decay=0.05, fused=fused),
    ]
    for step in range(STEPS):
        for index, (mine, its) in enumerate(zip(ours, theirs, strict=True)):
            mine.grad = torch.randn(mine.shape, generator=torch.Generator().manual_seed(100 * step + index))
            its.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for mine, its in zip(ours, theirs, strict=True):
        assert torch.equal(mine, its) if fused else torch.allclose(mine, its, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bucket_bytes", [1, 700, 2**27])
def test_batching_and_splitting_change_nothing(bucket_bytes):
    # float64 products: batched and single multiplications differ in the last bit, which float32 parameters do not show.
    shapes = {"o i": [(6, 9), (6, 9), (9, 6), (6, 9)], "e o i": [(5, 6, 9)], "i o": [(9, 6)]}
    parameters = {spec: [torch.nn.Parameter(torch.ones(shape)) for shape in group] for spec, group in shapes.items()}
    copies = {spec: [torch.nn.Parameter(p.detach().clone()) for p in group] for spec, group in parameters.items()}
    options = {"lr": 0.1, "ns_dtype": "float64"}
    together = NorMuon(
        [{"params": group, "layout": spec} for spec, group in parameters.items()], **options, bucket_bytes=bucket_bytes
    )
    apart = [NorMuon([{"params": [p], "layout": spec}], **options) for spec, group in copies.items() for p in group]
    for step in range(3):
        for spec, group in parameters.items():
            for index, parameter in enumerate(group):
                parameter.grad = gradients(tuple(parameter.shape), 10 * step + index)
                copies[spec][index].grad = parameter.grad.clone()
        together.step()
        for optimizer in apart:
            optimizer.step()
    for spec, group in parameters.items():
        for mine, copy in zip(group, copies[spec], strict=True):
            torch.testing.assert_close(mine, copy, rtol=1e-6, atol=1e-7)


def test_same_shapes_are_multiplied_in_one_batch():
    batches = []

    def recording(matrices):
        batches.append(tuple(matrices.shape))
        return orthogonalize(matrices)

    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in [(4, 6), (6, 4), (4, 6), (4, 6)]]
    experts = torch.nn.Parameter(torch.randn(5, 4, 6))
    groups = [{"params": parameters}, {"params": [experts], "layout": "e o i"}]
    optimizer = NorMuon(groups, orthogonalize_fn=recording)
    for parameter in [*parameters, experts]:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    assert sorted(batches) == [(1, 6, 4), (8, 4, 6)]


def test_update_has_the_rms_that_the_paper_promises():
    parameter = torch.nn.Parameter(torch.randn(16, 48))
    before = parameter.detach().clone()
    optimizer = NorMuon([parameter], lr=0.01, weight_decay=0.0, ns_dtype="float32")
    parameter.grad = gradients((16, 48), 0)
    optimizer.step()
    rms = (parameter - before).square().mean().sqrt()
    torch.testing.assert_close(rms.item(), 0.2 * 0.01, rtol=1e-4, atol=0.0)
