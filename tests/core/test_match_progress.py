"""The size of a step under match_progress_adamw: what it promises, its start, its bound, what it remembers."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from normuon_plugins import NorMuon, build_normuon
from normuon_plugins.core.gradient_squares import partial_sums, sum_squares
from normuon_plugins.distributed.boxes import pieces, whole
from normuon_plugins.distributed.placement import Blocks
from tests.models import tiny_llama

RULE = {"adjust_lr_fn": "match_progress_adamw"}
EXACT = {**RULE, "weight_decay": 0.0, "ns_dtype": "float64"}
LR = 1e-5  # so small that no bound is near


def moved(gradients, lr=LR, **options):
    """Return what each step took from one matrix, divided by the learning rate, and the optimizer."""
    weight = nn.Parameter(torch.zeros_like(gradients[0]))
    optimizer = NorMuon([("weight", weight)], lr=lr, **{**EXACT, **options})
    found = []
    for gradient in gradients:
        before = weight.detach().clone()
        weight.grad = gradient
        optimizer.step()
        found.append((before - weight.detach()) / lr)
    return found, optimizer


def noise(*shape, steps, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(steps)]


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_a_step_lowers_a_linear_loss_as_adamw_with_one_second_moment_would(nesterov, normalize):
    gradients = [gradient + 0.3 for gradient in noise(12, 20, steps=30)]
    steps, _ = moved(gradients, nesterov=nesterov, normalize_neurons=normalize)
    first, second = np.zeros((12, 20)), 0.0
    for gradient, step in zip(gradients, steps, strict=True):
        exact = gradient.numpy()
        first = 0.95 * first + 0.05 * exact
        second = 0.98 * second + 0.02 * float(np.mean(exact**2))
        update = 0.95 * first + 0.05 * exact if nesterov else first
        adamw = float(np.sum(update / math.sqrt(second) * update))
        assert float(np.sum(step.numpy() * update)) == pytest.approx(adamw, rel=1e-5)


def test_noise_of_full_rank_gives_the_constant_of_the_paper():
    steps, _ = moved(noise(64, 64, steps=150))
    rms = [float(step.square().mean().sqrt()) for step in steps[100:]]
    assert 0.18 < min(rms) < max(rms) < 0.24


def test_gradients_of_one_direction_that_agree_move_it_as_adamw_does_and_nothing_else():
    """AdamW's step is then the gradient over its root mean square: spectral norm sqrt(m * n), RMS 1."""
    left, right = torch.randn(32, dtype=torch.float64), torch.randn(48, dtype=torch.float64)
    gradient = torch.outer(left, right)
    steps, _ = moved([gradient] * 200, normalize_neurons=False)
    values = torch.linalg.svdvals(steps[-1])
    assert float(values[0]) == pytest.approx(math.sqrt(32 * 48), rel=0.01)
    assert float(values[1]) < 1e-6 * float(values[0])


@pytest.mark.parametrize("factor", [1e-12, 1e12])
def test_the_unit_of_the_loss_does_not_matter(factor):
    gradients = noise(8, 6, steps=5)
    plain, _ = moved(gradients)
    scaled, _ = moved([gradient * factor for gradient in gradients])
    for one, other in zip(plain, scaled, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-9)


def test_a_matrix_whose_gradient_vanishes_comes_to_rest():
    gradients = noise(16, 16, steps=20)
    steps, _ = moved([*gradients, *[gradient * 1e-3 for gradient in noise(16, 16, steps=80, seed=1)]])
    assert float(steps[-1].norm()) < 0.05 * float(steps[19].norm())
    fixed, _ = moved([*gradients, *[gradient * 1e-3 for gradient in gradients * 4]], adjust_lr_fn="match_rms_adamw")
    assert float(fixed[-1].norm()) > 0.9 * float(fixed[19].norm())


@pytest.mark.parametrize("nesterov", [True, False])
def test_the_start_is_within_the_stated_range_of_the_corrected_averages(nesterov):
    """A gradient that never changes: AdamW's step, corrected for its start, has an RMS of 1 from the first one on."""
    gradient = torch.outer(torch.randn(16, dtype=torch.float64), torch.randn(16, dtype=torch.float64))
    steps, _ = moved([gradient] * 300, normalize_neurons=False, nesterov=nesterov)
    spectral = [float(torch.linalg.matrix_norm(step, 2)) / 16 for step in steps]
    assert min(spectral) > (0.68 if nesterov else 0.34)
    assert max(spectral) < 1.19
    assert spectral[-1] == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("shape", [(64, 16), (16, 64)])
@pytest.mark.parametrize("lr", [1e-3, 0.02, 1.0])
def test_a_step_is_bounded_and_a_rate_far_too_high_gives_the_fixed_size(shape, lr):
    """The bound is on the root mean square of the singular values, learning rate included."""
    gradient = torch.outer(torch.randn(shape[0]), torch.randn(shape[1])).double() + 1e-3 * noise(*shape, steps=1)[0]
    (step,), _ = moved([gradient], lr=lr, ns_coefficients="muon")
    rms = float(step.square().mean().sqrt())
    largest = max(0.2, 0.04 / (lr * 8))
    assert rms <= largest * 1.0001
    assert (rms == pytest.approx(largest, rel=1e-4)) is (lr > 1e-3)


def test_zeros_move_nothing_and_leave_no_nan():
    steps, optimizer = moved([torch.zeros(6, 4)] * 2 + noise(6, 4, steps=1, dtype=torch.float32) + [torch.zeros(6, 4)])
    assert not steps[0].any()
    assert not steps[1].any()
    assert all(step.isfinite().all() for step in steps)
    assert steps[2].any()
    assert all(value.isfinite().all() for state in optimizer.state.values() for value in state.values())


def test_nan_is_not_hidden():
    gradient = torch.randn(4, 4, dtype=torch.float64)
    gradient[1, 2] = math.nan
    steps, _ = moved([gradient])
    assert steps[0].isnan().all()


def test_a_lora_factor_beside_one_that_is_still_zero_waits_and_then_moves():
    """B is zero at first, so that A has no gradient: 0 / 0 must be 0."""
    torch.manual_seed(0)
    a, b = nn.Parameter(torch.randn(4, 16) / 4), nn.Parameter(torch.zeros(16, 4))
    optimizer = NorMuon([("a", a), ("b", b)], lr=1e-3, **{**RULE, "weight_decay": 0.0})
    start = a.detach().clone()
    x = torch.randn(8, 16)
    for step in range(2):
        (x @ a.T @ b.T - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(a, start) is (step == 0)
        assert b.any()


def test_decay_follows_the_learning_rate_alone():
    weight = nn.Parameter(torch.ones(6, 4))
    optimizer = NorMuon([weight], lr=0.1, **{**RULE, "weight_decay": 0.5})
    weight.grad = torch.zeros(6, 4)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((6, 4), 0.95))


@pytest.mark.parametrize("key", ["momentum", "lr"])
def test_groups_that_share_a_batch_keep_their_own_options(key):
    values = {"momentum": (0.95, 0.8), "lr": (0.05, torch.tensor(0.2))}[key]

    def run(groups):
        optimizer = NorMuon(groups, **{**RULE, "ns_dtype": "float32"})
        for step in range(4):
            for number, parameter in enumerate(p for group in groups for p in group["params"]):
                seed = step * 10 + int(number if len(groups) > 1 else parameter.tag)
                parameter.grad = noise(6, 5, steps=1, seed=seed, dtype=torch.float32)[0]
            optimizer.step()
        return [p.detach().clone() for group in groups for p in group["params"]]

    def parameter(tag):
        made = nn.Parameter(torch.zeros(6, 5))
        made.tag = tag
        return made

    together = run([{"params": [parameter(number)], key: value} for number, value in enumerate(values)])
    alone = [run([{"params": [parameter(number)], key: value}])[0] for number, value in enumerate(values)]
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


def test_one_number_is_remembered_per_matrix():
    shapes = {"o i": (8, 6), "i o": (6, 8), "e o i": (3, 8, 6), "o=4+2+2 i": (8, 6), "e i o%1+1": (3, 6, 8)}
    expected = {"o i": (1, 1), "i o": (1, 1), "e o i": (3, 1, 1), "o=4+2+2 i": (3, 1), "e i o%1+1": (3, 1, 2)}
    for layout, shape in shapes.items():
        weight = nn.Parameter(torch.zeros(shape))
        optimizer = NorMuon([{"params": [weight], "layout": layout}], **RULE)
        weight.grad = torch.randn(shape)
        optimizer.step()
        state = optimizer.state[weight]["gradient_mean_square"]
        assert (tuple(state.shape), state.dtype) == (expected[layout], torch.float32)
        mean = 0.02 * float(weight.grad.square().mean())
        counts = {"o=4+2+2 i": torch.tensor([[4.0], [2.0], [2.0]])}.get(layout, torch.ones(1))
        assert float((state * counts).sum() / (counts.expand(state.shape)).sum()) == pytest.approx(mean, rel=1e-5)


def test_the_front_door_matches_progress_and_the_class_keeps_the_paper():
    assert build_normuon(tiny_llama()).defaults["adjust_lr_fn"] == "match_progress_adamw"
    assert build_normuon(tiny_llama(), adjust_lr_fn="original").defaults["adjust_lr_fn"] == "original"
    assert NorMuon([nn.Parameter(torch.zeros(2, 2))]).defaults["adjust_lr_fn"] == "match_rms_adamw"


def test_the_rule_is_said_once_in_the_log(caplog):
    with caplog.at_level("INFO", logger="normuon_plugins"):
        build_normuon(tiny_llama())
    assert [record.message for record in caplog.records if "match_progress_adamw" in record.message] == [
        "NorMuon: 14 matrices with adjust_lr_fn='match_progress_adamw', 7 other parameters on AdamW"
        " (which lr: docs/learning_rate.md)"
    ]


def trained(model, optimizer, steps):
    for step in range(steps):
        torch.manual_seed(step)
        tokens = torch.randint(64, (2, 8))
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("rule", ["match_rms_adamw", "match_progress_adamw"])
def test_a_resumed_run_keeps_the_rule_of_its_checkpoint(rule):
    model = tiny_llama()
    optimizer = build_normuon(model, lr=1e-3, adjust_lr_fn=rule)
    trained(model, optimizer, 3)
    resumed = copy.deepcopy(model)
    again = build_normuon(resumed)  # with today's default
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert {group["adjust_lr_fn"] for group in again.param_groups if group["algorithm"] == "normuon"} == {rule}
    one, other = trained(model, optimizer, 3), trained(resumed, again, 3)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_may_choose_the_rule_in_its_middle_and_leave_it_again():
    """The mean square then begins with the first gradient as it is: at zero, steps would be seven times too large."""
    gradients = noise(16, 16, steps=40)
    weight = nn.Parameter(torch.zeros(16, 16, dtype=torch.float64))
    optimizer = NorMuon([weight], lr=LR, **{**EXACT, "adjust_lr_fn": "match_rms_adamw"})
    sizes = []
    for step, gradient in enumerate(gradients):
        if step == 30:
            optimizer.param_groups[0]["adjust_lr_fn"] = "match_progress_adamw"
        before = weight.detach().clone()
        weight.grad = gradient
        optimizer.step()
        sizes.append(float((before - weight.detach()).square().mean().sqrt()) / LR)
    assert sizes[29] == pytest.approx(0.2, rel=1e-6)
    assert all(0.14 < size < 0.26 for size in sizes[30:])
    optimizer.param_groups[0]["adjust_lr_fn"] = "match_rms_adamw"
    optimizer.step()
    assert "gradient_mean_square" not in optimizer.state[weight]


def test_squares_are_added_up_by_matrix_wherever_they_lie():
    """Blocks of experts, cut in columns: the sums of two ranks together are those of numpy."""
    gradient = torch.randn(5, 6, 4, dtype=torch.float64)
    halves = (((0, 5),), ((0, 6),), ((0, 2),)), (((0, 5),), ((0, 6),), ((2, 4),))
    box = (((1, 2), (3, 5)), ((0, 3), (5, 6)), ((0, 4),))
    sums = [
        sum_squares(gradient[..., columns].contiguous(), pieces(half, box), box, 0)
        for half, columns in zip(halves, (slice(0, 2), slice(2, 4)), strict=True)
    ]
    chosen = gradient.numpy()[[1, 3, 4]][:, [0, 1, 2, 5]]
    np.testing.assert_allclose(torch.stack(sums).sum(0).numpy(), (chosen**2).sum((1, 2))[None], rtol=1e-6)


def test_long_sums_of_squares_lose_nothing():
    generator = torch.Generator().manual_seed(0)
    for gradient in (torch.randn(3000, 1500, generator=generator), torch.randn(1500, 3000, generator=generator).T):
        box = whole(tuple(gradient.shape))
        exact = float(gradient.double().square().sum())
        assert sum_squares(gradient, pieces(box, box), box, None).item() == pytest.approx(exact, rel=1e-6)


def test_every_rank_of_a_replica_has_a_row_and_ranks_without_the_matrix_have_none():
    rows = [((0, 2),), ((2, 4),), ()] * 2
    blocks = Blocks(tuple(range(6)), tuple((row, ((0, 3),)) for row in rows), (0, 0, 0, 1, 1, 1))
    found, box = partial_sums(blocks, (((0, 4),), ((0, 3),)), 1)
    assert box == (((0, 2),), ((0, 1),))
    assert [boxes[0] for boxes in found.boxes] == [((0, 1),), ((1, 2),), ()] * 2
