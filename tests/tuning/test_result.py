"""What is said of a search: the verdict, the lines to paste, the picture, the file of numbers."""

import json
import math

import pytest
import torch
from transformers import TrainingArguments

from normuon_plugins import build_normuon
from normuon_plugins.hf_trainer import register_normuon, unregister_normuon
from normuon_plugins.hf_trainer.arguments import normuon_options
from normuon_plugins.tuning import LearningRates, Trial
from normuon_plugins.tuning.recipe import lines_to_paste
from tests.models import tiny_llama

START = {"lr": 0.001, "adamw_lr": 0.001}
BEST = {"lr": 0.004, "adamw_lr": 0.002}


def result(start_losses=(4.0, 4.0, 4.0), best_losses=(3.5, 3.5, 3.5), **changes):
    trials = [
        Trial(**rates, steps=100, order=order, loss=loss)
        for rates, losses in ((START, start_losses), (BEST, best_losses))
        for order, loss in enumerate(losses)
    ]
    fields = {
        "best": BEST,
        "start": START,
        "trials": [*trials, Trial(lr=0.004, adamw_lr=0.001, steps=25, loss=4.2)],
        "steps": 100,
        "budget": 20,
        "open_ends": [],
        "untrained_loss": 5.0,
        "training_batches": 100,
        "held_out_batches": 15,
        "was_split": True,
        "seconds": 12.0,
    }
    return LearningRates(**{**fields, **changes})


def test_a_gain_in_every_order_and_above_the_noise_is_recommended():
    found = result((4.0, 4.05, 4.02), (3.5, 3.52, 3.49))
    assert (found.lr, found.adamw_lr) == (0.004, 0.002)
    assert found.gain == pytest.approx(0.53)  # of the orders that did not choose
    assert found.noise == pytest.approx(0.05)
    assert str(found).count("Take lr 0.004 and adamw_lr 0.002: better than lr 0.001 and adamw_lr 0.001 by 0.53") == 1


@pytest.mark.parametrize(
    ("start", "best", "words"),
    [
        (
            (3.52, 3.60, 3.55),
            (3.50, 3.58, 3.54),
            "is better by 0.015 on other orders of the batches, and another order",
        ),
        ((3.52, 3.50, 3.51), (3.50, 3.52, 3.51), "is better in one order of the batches, and worse in others"),
        ((3.52, 3.80, 3.51), (3.50, 3.52, 3.53), "is better by 0.13 on other orders"),
    ],
)
def test_a_gain_that_may_be_chance_is_not_recommended(start, best, words):
    found = result(start, best)
    assert (found.lr, found.adamw_lr) == (0.001, 0.001)
    assert "Keep lr 0.001 and adamw_lr 0.001: lr 0.004 and adamw_lr 0.002 " + words in str(found)
    assert "build_normuon(model, lr=0.001, adamw_lr=0.001)" in str(found)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"start": BEST}, "Keep lr 0.004 and adamw_lr 0.002: nothing that was tried is better."),
        ({"start": None}, "Best: lr 0.004 and adamw_lr 0.002. To compare with: another order of the batches moves"),
        ({"start_losses": (math.inf,) * 3}, "Take lr 0.004 and adamw_lr 0.002: with lr 0.001 and adamw_lr 0.001 the"),
        ({"start_losses": (4.0,), "best_losses": (3.5,)}, "by 0.5, in one run of each; a larger budget repeats them."),
        ({"open_ends": [("lr", 1)]}, "The budget ended before a larger lr than 0.004 was tried"),
        ({"open_ends": [("adamw_lr", -1)]}, "The budget ended before a smaller adamw_lr than 0.002 was tried"),
        ({"training_batches": 10}, "used its 10 batches more than once"),
        ({}, "Loss is the mean over 15 batches of yours that no run trained on; before training it was 5."),
        ({"was_split": False}, "Loss is the mean over 15 validation batches"),
    ],
)
def test_what_a_reader_must_know_is_said(changes, words):
    assert words in str(result(**changes))


def test_rates_that_are_as_good_are_named():
    found = result((4.0, 4.1, 4.0), (3.5, 3.5, 3.5))
    near = [Trial(lr=lr, adamw_lr=0.002, steps=100, loss=loss) for lr, loss in ((0.002, 3.55), (0.008, 3.7))]
    found = result((4.0, 4.1, 4.0), trials=[*found.trials, *near])
    assert "Within that, lr from 0.002 to 0.004 is as good." in str(found)
    assert "adamw_lr from" not in str(found)


OPTIONS = {
    "weight_decay": 0.05,
    "nesterov": False,
    "ns_coefficients": (3.4, -4.7, 2.0),
    "momentum_dtype": "bfloat16",
    "process_group": None,
}


def call(line, names):
    """Return what a line to paste evaluates to."""
    return eval(line.replace("..., ", ""), names)


def test_the_line_for_a_program_builds_the_optimizer_of_the_trials():
    line = lines_to_paste(BEST, OPTIONS)[0]
    optimizer = call(line, {"build_normuon": build_normuon, "model": tiny_llama()})
    expected = build_normuon(tiny_llama(), **BEST, **OPTIONS)
    for ours, theirs in zip(optimizer.param_groups, expected.param_groups, strict=True):
        assert {**ours, "params": None} == {**theirs, "params": None}


@pytest.mark.parametrize("options", [{}, {key: value for key, value in OPTIONS.items() if key != "process_group"}])
def test_the_line_for_the_trainer_means_the_same(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    register_normuon()
    try:
        line = lines_to_paste(BEST, options)[1]
        arguments = call(line, {"TrainingArguments": lambda **fields: TrainingArguments("out", **fields)})
        read = normuon_options(arguments)
    finally:
        unregister_normuon()
    optimizer, expected = build_normuon(tiny_llama(), **read), build_normuon(tiny_llama(), **BEST, **options)
    for ours, theirs in zip(optimizer.param_groups, expected.param_groups, strict=True):
        assert {**ours, "params": None} == {**theirs, "params": None}


def test_options_that_no_line_can_hold_are_named():
    lines = lines_to_paste(BEST, {"overrides": {"down_proj": "adamw"}, "beta2": 0.9})
    assert "beta2=0.9" in lines[0]
    assert lines[2] == "# and as in the search: overrides"


def test_numbers_are_saved_for_machines(tmp_path):
    found = result(start_losses=(math.inf,), best_losses=(3.5,), options={"beta2": 0.9, "orthogonalize_fn": torch.relu})
    read = json.loads(found.save(tmp_path / "new" / "rates.json").read_text())
    assert (read["lr"], read["adamw_lr"], read["best"], read["start"]) == (0.004, 0.002, BEST, START)
    assert [trial["loss"] for trial in read["trials"]] == [None, 3.5, 4.2]
    assert read["options"]["beta2"] == 0.9


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"start": None},
        {"start_losses": (math.inf,) * 3},
        {"start_losses": (math.inf,), "best_losses": (math.inf,)},
        {"best": {"lr": 0.004}, "start": None, "trials": [Trial(lr=0.004, steps=100, loss=1.0)]},
    ],
)
def test_the_picture_is_a_picture(changes, tmp_path):
    from matplotlib.image import imread

    found = result(**changes)
    height, width, _ = imread(found.draw(tmp_path / "new" / "rates.png")).shape
    assert width > 500
    assert height > 300


def test_a_picture_without_a_format_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"rates\.txt: no picture has such a name; end it in \.png"):
        result().draw(tmp_path / "rates.txt")


def test_missing_matplotlib_is_a_command_to_run(monkeypatch, tmp_path):
    monkeypatch.setattr("normuon_plugins.extras.find_spec", lambda package: None)
    with pytest.raises(ImportError, match=r'matplotlib is not installed; run: pip install "normuon-plugins\[tune\]"'):
        result().draw(tmp_path / "rates.png")
