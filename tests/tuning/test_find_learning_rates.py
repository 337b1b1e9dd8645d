"""find_learning_rates: the optimum of a problem that can be computed, and a model that ends as it began."""

import copy
import inspect
import itertools
import json
import math
import random

import numpy
import pytest
import torch
from torch.utils.data import DataLoader

from normuon_plugins import build_normuon
from normuon_plugins.tuning import find_learning_rates, trial
from tests.models import tiny_llama
from tests.tuning.toys import (
    Noisy,
    Quadratic,
    counting_tokens,
    flat_batches,
    noisy_batches,
    noisy_loss,
    quadratic_loss,
)

STEPS = 8
QUIET = {"progress": None}
PLAIN = {"loss": quadratic_loss, "schedule": "constant", "warmup": 0, "max_grad_norm": None, **QUIET}
# Of the paper's scaling the size of a step is known; nothing here depends on the default.
PAPER = {"adjust_lr_fn": "match_rms_adamw", "weight_decay": 0.0, "ns_coefficients": (1.5, -0.5, 0.0), "ns_steps": 40}


def best_by_torch(wide, rates):
    """Return the rate at which torch's own AdamW brings a vector nearest to its optimum in as many steps."""

    def loss(rate):
        vector = torch.zeros(4, requires_grad=True)
        optimizer = torch.optim.AdamW([vector], lr=rate, betas=(0.9, 0.95), weight_decay=0)
        for _ in range(STEPS):
            optimizer.zero_grad()
            (vector - wide).square().sum().backward()
            optimizer.step()
        return (vector - wide).square().sum().item()

    return min(rates, key=loss)


def test_both_optima_of_a_separable_problem_are_found():
    # a step moves an entry of the identity by 0.2 lr times the root of the rows: the last one reaches the optimum
    hidden = 0.08
    far = STEPS * hidden * 0.2 * math.sqrt(4)
    expected = best_by_torch(wide := 0.3, [0.01 * 2.0**exponent for exponent in range(-6, 9)])
    assert expected / 0.01 in (4, 8)
    found = find_learning_rates(
        Quadratic(far, wide), flat_batches(10), lr=0.01, steps=STEPS, budget=40, **PLAIN, **PAPER
    )
    assert (found.lr, found.adamw_lr) == (hidden, expected)
    assert found.is_gain
    assert found.loss == min(trial.loss for trial in found.trials)
    assert found.open_ends == []


@pytest.mark.parametrize("scale", [1e-3, 30.0])
def test_without_a_rate_the_order_of_magnitude_is_found_first(scale):
    hidden = 0.08 * scale
    model = Quadratic(STEPS * hidden * 0.2 * 2, 0.3 * scale)
    found = find_learning_rates(model, flat_batches(10), steps=STEPS, budget=40, **PLAIN, **PAPER)
    assert hidden / 2 < found.lr < hidden * 2
    assert found.start is None
    assert found.gain is None


def everything(model):
    """Return all that a search might change, to compare bit by bit."""
    return {
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "gradients": [p.grad if p.grad is None else p.grad.clone() for p in model.parameters()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "random": (torch.get_rng_state(), random.getstate(), numpy.random.get_state()),
        "objects": [*map(id, model.parameters()), *map(id, model.buffers())],
    }


def assert_same(first, second):
    torch.testing.assert_close(first["state"], second["state"], rtol=0, atol=0)
    for before, after in zip(first["gradients"], second["gradients"], strict=True):
        assert (before is None) == (after is None)
        assert before is None or before.equal(after)
    assert first["random"][0].equal(second["random"][0])
    assert repr(first["random"][1:]) == repr(second["random"][1:])
    for key in ("requires_grad", "modes", "objects"):
        assert first[key] == second[key]


def used(seed=0):
    """Return a model in the middle of something: a gradient, a part in another mode, statistics."""
    model = Noisy(seed)
    noisy_loss(model, noisy_batches(1, seed=5)[0]).backward()
    model.body[1].eval()
    return model


def test_the_model_ends_as_it_began():
    model = used()
    before = everything(model)
    found = find_learning_rates(model, noisy_batches(12), loss=noisy_loss, lr=1e-3, budget=6, **QUIET)
    assert len(found.trials) > 4
    assert_same(before, everything(model))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_model_ends_as_it_began_also_where_a_trial_is_stopped(error):
    model = used()
    before = everything(model)
    calls = 0

    def stops(model, batch):
        nonlocal calls
        calls += 1
        if calls == 22:  # in the second trial
            raise error("stopped")
        return noisy_loss(model, batch)

    lines = []
    with pytest.raises(error):
        find_learning_rates(model, noisy_batches(40), loss=stops, lr=1e-3, progress=lines.append)
    assert sum(line.startswith("run ") for line in lines) == 1
    assert_same(before, everything(model))


def test_every_trial_is_what_a_plain_loop_does_on_a_new_model():
    """With transformers' schedule in the place of ours, where the two agree: without a warmup."""
    from transformers import get_cosine_schedule_with_warmup

    batches = noisy_batches(16)
    found = find_learning_rates(Noisy(), batches, loss=noisy_loss, lr=2e-3, warmup=0, budget=4, seed=3, **QUIET)
    held_out = batches[::8]
    training = [batch for place, batch in enumerate(batches) if place % 8]
    assert found.held_out_batches == len(held_out)
    assert len(found.trials) > 2
    for done in found.trials:
        model = Noisy()
        optimizer = build_normuon(model, lr=done.lr, adamw_lr=done.adamw_lr)
        schedule = get_cosine_schedule_with_warmup(optimizer, 0, done.steps)
        torch.manual_seed(3)
        for batch in training[: done.steps]:
            noisy_loss(model, batch).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            expected = sum(noisy_loss(model, batch).item() for batch in held_out) / len(held_out)
        assert done.loss == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("warmup", "schedule"), [(0, "constant"), (0.2, "linear"), (4, "cosine"), (20, "cosine")])
def test_the_schedule_is_that_of_transformers_without_its_step_of_zero(warmup, schedule):
    from transformers import get_scheduler

    full, short = 20, 5
    batches = trial.Batches([None] * full, [None], True, full)
    task = trial.Task(None, None, batches, None, schedule, warmup, None, 0, {})
    for steps in (full, short):
        warm = math.ceil((warmup if warmup < 1 else warmup / full) * steps)
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        name = "constant_with_warmup" if schedule == "constant" else schedule
        theirs = get_scheduler(name, optimizer, num_warmup_steps=warm, num_training_steps=steps)
        ours = [task.factor(step, steps) for step in range(steps)]
        expected = [theirs.lr_lambdas[0](step) for step in range(steps)]
        assert ours[warm:] == pytest.approx(expected[warm:])
        assert all(one < two for one, two in itertools.pairwise(ours[:warm]))
        assert min(ours) > 0


def test_a_search_repeats_itself():
    runs = [find_learning_rates(Noisy(), noisy_batches(12), loss=noisy_loss, lr=1e-3, budget=6, **QUIET) for _ in "ab"]
    assert runs[0].trials == runs[1].trials


def test_orders_of_the_batches_differ_and_are_counted_as_noise():
    found = find_learning_rates(Noisy(), noisy_batches(12), loss=noisy_loss, lr=1e-4, budget=12, **QUIET)
    assert found.noise > 0
    assert {trial.order for trial in found.trials} == {0, 1, 2}


def test_the_budget_is_stated_before_the_first_run_and_kept():
    lines = []
    arguments = {"loss": noisy_loss, "lr": 1e-3, "steps": 20, "budget": 7}
    found = find_learning_rates(Noisy(), noisy_batches(24), progress=lines.append, **arguments)
    assert lines[0].startswith("At most 7 runs of 20 steps, or more and shorter ones: 140 steps.")
    assert lines[1].startswith("run 1: ")
    assert lines[2].startswith("All runs together: about ")
    assert sum(trial.steps for trial in found.trials) <= 140


def test_runs_that_diverge_are_results(recwarn):
    def cliff(model, batch):
        loss = model.loss(batch)
        return loss * math.nan if model.bias.abs().max() > 0.2 else loss

    model = Quadratic(1.0, 0.15)
    found = find_learning_rates(model, flat_batches(10), lr=0.05, budget=16, **{**PLAIN, "loss": cliff})
    assert any(math.isinf(trial.loss) for trial in found.trials)
    assert math.isfinite(found.loss)
    assert "diverged" in str(found)
    assert not recwarn.list


def test_where_everything_diverges_it_says_so():
    def broken(model, batch):
        return model.loss(batch) * (math.nan if model.training else 1.0)

    found = find_learning_rates(Quadratic(), flat_batches(10), lr=0.05, budget=4, **{**PLAIN, "loss": broken})
    assert math.isinf(found.loss)
    assert "Every run diverged." in str(found)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["loss"] is None


def test_gradients_that_are_refused_are_a_divergence():
    def cliff(model, batch):
        loss = model.loss(batch)
        if model.training:
            model.bias.register_hook(lambda gradient: gradient * math.nan)
        return loss

    found = find_learning_rates(
        Quadratic(), flat_batches(10), lr=0.05, budget=4, nonfinite="raise", **{**PLAIN, "loss": cliff}
    )
    assert all(math.isinf(trial.loss) for trial in found.trials)


@pytest.mark.parametrize("kind", [list, iter, lambda batches: DataLoader(batches, batch_size=None), tuple])
def test_batches_may_be_anything_that_can_be_read_once(kind):
    arguments = {"loss": noisy_loss, "lr": 1e-3, "budget": 4, **QUIET}
    expected = find_learning_rates(Noisy(), noisy_batches(12), **arguments)
    assert find_learning_rates(Noisy(), kind(noisy_batches(12)), **arguments).trials == expected.trials


def test_no_more_is_taken_from_an_endless_stream_than_is_needed():
    taken = 0

    def stream():
        nonlocal taken
        while True:
            taken += 1
            yield from noisy_batches(1, seed=taken)

    found = find_learning_rates(Noisy(), stream(), loss=noisy_loss, steps=14, budget=4, **QUIET)
    assert taken == 16
    assert (found.training_batches, found.held_out_batches) == (14, 2)


def test_validation_batches_judge_and_all_others_train():
    validation = noisy_batches(3, seed=9)
    arguments = {"loss": noisy_loss, "validation": iter(validation), "budget": 4, **QUIET}
    found = find_learning_rates(Noisy(), noisy_batches(6), **arguments)
    assert (found.training_batches, found.held_out_batches, found.was_split) == (6, 3, False)
    model = Noisy().eval()
    with torch.no_grad():
        assert found.untrained_loss == pytest.approx(sum(noisy_loss(model, batch).item() for batch in validation) / 3)


def test_a_hugging_face_model_needs_no_loss_function():
    model = tiny_llama()
    before = everything(model)
    found = find_learning_rates(model, counting_tokens(10), lr=1e-4, budget=6, **QUIET)
    assert found.is_gain
    assert found.lr > 1e-4
    assert found.loss < found.untrained_loss
    assert_same(before, everything(model))


def test_options_reach_the_optimizer(monkeypatch):
    seen = []

    def record(model, **options):
        seen.append(options)
        return build_normuon(model, **options)

    monkeypatch.setattr(trial, "build_normuon", record)
    options = {"beta2": 0.8, "overrides": {r"^head\.": "adamw"}}
    find_learning_rates(
        Noisy(), noisy_batches(8), loss=noisy_loss, lr=1e-3, adamw_lr=3e-3, budget=4, **QUIET, **options
    )
    assert all(options.items() <= given.items() for given in seen)
    assert (seen[0]["lr"], seen[0]["adamw_lr"]) == (1e-3, 3e-3)


def test_a_model_of_matrices_alone_has_one_rate():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False))
    batches = [torch.randn(8, 4) for _ in range(8)]
    found = find_learning_rates(model, batches, loss=lambda model, x: (model(x) - x).square().mean(), lr=1e-3, **QUIET)
    assert found.adamw_lr is None
    assert "adamw_lr=" not in str(found)


@pytest.mark.parametrize(
    ("batches", "arguments", "error", "message"),
    [
        ([], {}, ValueError, r"batches has 0; give at least two batches"),
        (noisy_batches(1), {}, ValueError, r"batches has 1; give at least two batches"),
        ([], {"validation": noisy_batches(1)}, ValueError, r"batches has 0; give at least one batch "),
        (noisy_batches(4), {"validation": []}, ValueError, r"validation has no batches"),
        ({"input_ids": 0}, {}, TypeError, r"batches must be several batches, .* not one dict"),
        (torch.zeros(4), {}, TypeError, r"batches must be several batches, .* not one Tensor"),
        (3, {}, TypeError, r"batches must be several batches, .* not one int"),
        (noisy_batches(4), {"loss": None}, TypeError, r"a batch is a tuple, not a dict; give loss="),
        (noisy_batches(4), {"loss": lambda m, b: m(b[0])}, TypeError, r"one element, and is \(16, 1\)"),
        (noisy_batches(4), {"loss": lambda m, b: 1.0}, TypeError, r"one element, and is float"),
        (noisy_batches(4), {"loss": lambda m, b: m(b[0]).sum() * math.inf}, ValueError, "not finite before the first"),
        (noisy_batches(4), {"lr": 0}, ValueError, r"lr=0 must be above 0"),
        (noisy_batches(4), {"adamw_lr": -1.0}, ValueError, r"adamw_lr=-1.0 must be above 0"),
        (noisy_batches(4), {"steps": 0}, ValueError, r"steps=0 must be at least 1"),
        (noisy_batches(4), {"budget": 2}, ValueError, r"budget=2 must be at least 4"),
        (noisy_batches(4), {"warmup": -1}, ValueError, r"warmup=-1 must be"),
        (noisy_batches(4), {"schedule": "step"}, ValueError, r"schedule='step' is not known"),
        (noisy_batches(4), {"momentun": 0.9}, TypeError, r"unknown options \['momentun'\]"),
        (noisy_batches(4), {"beta2": 2.0}, ValueError, r"beta2=2.0"),
    ],
)
def test_what_is_wrong_is_said_before_the_first_run(batches, arguments, error, message):
    lines = []
    with pytest.raises(error, match=message):
        find_learning_rates(Noisy(), batches, **{"loss": noisy_loss, "progress": lines.append, **arguments})
    assert lines == []


def test_a_model_that_gives_no_loss_is_told_what_to_do():
    batches = [{"input_ids": batch["input_ids"]} for batch in counting_tokens(4)]
    with pytest.raises(TypeError, match=r"LlamaForCausalLM gives no \.loss for a batch of \['input_ids'\]; .* labels"):
        find_learning_rates(tiny_llama(), batches, **QUIET)


def test_names_that_others_write_against():
    names = ["model", "batches", "loss", "validation", "lr", "adamw_lr", "steps", "warmup", "schedule", "budget"]
    names += ["max_grad_norm", "seed", "progress", "options"]
    assert list(inspect.signature(find_learning_rates).parameters) == names


def test_a_copy_of_the_model_is_not_needed(monkeypatch):
    monkeypatch.setattr(copy, "deepcopy", lambda *_: pytest.fail("copied"))
    find_learning_rates(Quadratic(), flat_batches(4), lr=0.01, budget=4, **PLAIN)
