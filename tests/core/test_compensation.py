"""kahan_sum: weights in 16 bits that lose no small update, under both algorithms."""

import copy

import pytest
import torch

from normuon_plugins import NorMuon, build_normuon
from tests.core.test_momentum_dtype import SHAPES, Largest, gradient
from tests.models import tiny_llama, token_blocks
from tests.reference import ReferenceNorMuon, newton_schulz

HALF = (torch.bfloat16, torch.float16)
# What is lost of a number that two of 16 bits hold; nothing below 2**-24 exists in float16.
LOST = {torch.bfloat16: (2**-16, 0.0), torch.float16: (2**-21, 2**-24)}


def exact(optimizer, parameter):
    return parameter.detach().double() + optimizer.state[parameter]["kahan_compensation"].double()


def adamw(weight, **options):
    return NorMuon([{"params": [("weight", weight)], "algorithm": "adamw"}], kahan_sum=True, **options)


@pytest.mark.parametrize("dtype", HALF)
def test_a_thousand_small_updates_of_a_gain_near_one_add_up(dtype):
    gain = torch.nn.Parameter(torch.tensor([1.0, -1.0, 0.5], dtype=dtype))
    lost = torch.nn.Parameter(gain.detach().clone())
    theirs = torch.nn.Parameter(gain.detach().float())
    optimizer, plain = adamw(gain, lr=1e-4), NorMuon([{"params": [lost], "algorithm": "adamw"}], lr=1e-4)
    reference = torch.optim.AdamW([theirs], lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(1000):
        for parameter in (gain, lost, theirs):
            parameter.grad = torch.ones_like(parameter)
        for step in (optimizer.step, plain.step, reference.step):
            step()
    torch.testing.assert_close(theirs.detach(), torch.tensor([0.9, -1.1, 0.4]), rtol=0, atol=1e-4)
    # the moments in bfloat16 stop a little before those in float32 end, and so the updates are some percent larger
    torch.testing.assert_close(exact(optimizer, gain), theirs.detach().double(), rtol=0, atol=5e-3)
    assert torch.equal(gain, exact(optimizer, gain).to(dtype))
    assert lost[1] == -1.0


def test_small_updates_of_a_matrix_add_up_to_those_of_float64():
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter((1 + torch.rand(4, 6, generator=generator)).bfloat16())
    options = {"lr": 1e-3, "weight_decay": 0.1, "momentum": 0.9, "beta2": 0.9, "eps": 1e-8, "nesterov": True}
    reference = ReferenceNorMuon(
        weight.detach(), **options, normalize=True, scaling="match_rms_adamw", orthogonalize=newton_schulz
    )
    optimizer = NorMuon([weight], **options, ns_dtype="float32", momentum_dtype="float32", kahan_sum=True)
    before = weight.detach().clone()
    mean = torch.randn(4, 6, generator=generator)
    for _ in range(200):
        weight.grad = (mean + torch.randn(4, 6, generator=generator)).bfloat16()
        reference.step(weight.grad)
        optimizer.step()
    moved = (reference.weight - before).norm()
    assert moved > 0.01 * before.double().norm()
    assert (exact(optimizer, weight) - reference.weight).norm() < 0.01 * moved


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("layout", "shape"), SHAPES.values(), ids=SHAPES)
def test_a_step_is_that_of_float32_up_to_what_two_numbers_hold(layout, shape, dtype):
    options = {"lr": 0.01, "weight_decay": 0.1, "ns_dtype": "float32", "momentum_dtype": "float32"}
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    weights = [torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.float())]
    optimizers = [
        NorMuon([{"params": [weight], "layout": layout}], bucket_bytes=3000, kahan_sum=True, **options)
        for weight in weights
    ]
    for step in range(3):
        for weight, optimizer in zip(weights, optimizers, strict=True):
            weight.grad = gradient(shape, step, dtype).to(weight.dtype)
            optimizer.step()
    relative, absolute = LOST[dtype]
    expected = weights[1].detach().double()
    limit = 4 * (relative * expected.abs().clamp_min(1e-3) + absolute)
    assert ((exact(optimizers[0], weights[0]) - expected).abs() <= limit).all()
    assert "kahan_compensation" not in optimizers[1].state[weights[1]]


def strided(kind, values):
    """Return ``values``, a matrix, in another memory layout."""
    if kind == "transposed":
        return values.T.clone().T
    wide = torch.zeros(values.shape[0], 2 * values.shape[1], dtype=values.dtype)
    wide[:, ::2] = values
    return wide[:, ::2]


@pytest.mark.parametrize("kind", ["transposed", "sliced"])
@pytest.mark.parametrize("bucket_bytes", [1, 300, 2**20])
def test_an_embedding_moves_as_under_torchs_adamw_some_rows_at_a_time(bucket_bytes, kind):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(33, 5, generator=generator).bfloat16()
    weights = [
        torch.nn.Parameter(start.clone()),
        torch.nn.Parameter(strided(kind, start)),
        torch.nn.Parameter(torch.tensor(1.5, dtype=torch.bfloat16)),
    ]
    theirs = [torch.nn.Parameter(weight.detach().float().contiguous()) for weight in weights]
    group = {"params": weights, "algorithm": "adamw", "weight_decay": 0.1}
    optimizer = NorMuon([group], lr=0.01, kahan_sum=True, bucket_bytes=bucket_bytes)
    reference = torch.optim.AdamW(theirs, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    for _ in range(3):
        for weight, other in zip(weights, theirs, strict=True):
            weight.grad = torch.randn(weight.shape, generator=generator).bfloat16()
            other.grad = weight.grad.float()
        optimizer.step()
        reference.step()
    for weight, other in zip(weights, theirs, strict=True):
        assert optimizer.state[weight]["step"] == 3
        # the moments are bfloat16 between steps, and the movement is 0.03 at most
        torch.testing.assert_close(exact(optimizer, weight), other.detach().double(), rtol=2**-16, atol=2e-4)


def test_zero_gradients_at_rate_zero_leave_the_weights_and_create_the_state():
    model = tiny_llama().bfloat16()
    before = copy.deepcopy(model.state_dict())
    optimizer = build_normuon(model, lr=0.0, kahan_sum=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all("kahan_compensation" in optimizer.state[parameter] for parameter in model.parameters())


@pytest.mark.parametrize("now", [False, True])
def test_a_checkpoint_with_the_other_setting_starts_at_zero_or_drops_what_was_kept(now):
    def optimizer(kahan_sum):
        weights = [torch.nn.Parameter(torch.ones(shape, dtype=torch.bfloat16)) for shape in ((3, 4), (5,))]
        result = NorMuon([{"params": weights[:1]}, {"params": weights[1:], "algorithm": "adamw"}], kahan_sum=kahan_sum)
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        return weights, result

    _, saved = optimizer(not now)
    saved.step()
    weights, loaded = optimizer(now)
    loaded.load_state_dict(copy.deepcopy(saved.state_dict()))
    for weight, before in zip(weights, saved.state.values(), strict=True):
        state = loaded.state[weight]
        assert state.keys() ^ before.keys() == {"kahan_compensation"}
        assert all(torch.equal(state[key], before[key]) for key in state.keys() & before.keys())
        assert not now or not state["kahan_compensation"].any()
    loaded.step()


def final_loss(dtype, seed, steps, **options):
    """Return the training loss after some steps, from the same weights in every dtype."""
    model = tiny_llama(seed).bfloat16().to(dtype)
    optimizer = build_normuon(model, weight_decay=0.0, ns_dtype="float32", **options)
    batch = torch.utils.data.default_collate(token_blocks(8))
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float(model.float()(**batch).loss)


def test_compensated_training_follows_float32_where_bfloat16_stalls():
    exactly = final_loss(torch.float32, 0, 100, lr=1e-4)
    compensated = final_loss(torch.bfloat16, 0, 100, lr=1e-4, kahan_sum=True)
    stalled = final_loss(torch.bfloat16, 0, 100, lr=1e-4)
    assert stalled - exactly > 0.03
    assert abs(compensated - exactly) < 0.05 * (stalled - exactly)


def test_momentum_in_fewer_bits_trains_to_the_loss_of_float32_within_the_noise_of_seeds():
    losses = [final_loss(torch.float32, seed, 50, lr=1e-3) for seed in range(3)]
    noise = max(losses) - min(losses)
    for dtype in ("bfloat16", "int8"):
        assert abs(final_loss(torch.float32, 0, 50, lr=1e-3, momentum_dtype=dtype) - losses[0]) < 0.5 * noise


def test_float32_copies_of_an_embedding_are_bounded_by_bucket_bytes():
    table = torch.nn.Parameter(torch.ones(4096, 64, dtype=torch.bfloat16))
    optimizer = adamw(table, bucket_bytes=2**16)
    for _ in range(2):
        table.grad = torch.ones_like(table)
        with Largest() as largest:
            optimizer.step()
    assert largest.nbytes == 2**14  # weight, gradient and two moments
