"""Which rates are tried: on landscapes whose optimum is known, without training anything."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from normuon_plugins.tuning.grid import START, Point, Run, rates_at
from normuon_plugins.tuning.search import LEAST, Search

STEPS = 40
PLACES = st.integers(-7, 7)


def spend(search, loss):
    """Do what the search asks for, and return its best point."""
    runs = search.runs()
    run = next(runs)
    while True:
        try:
            run = runs.send(loss(run))
        except StopIteration as stop:
            return stop.value


def bowl(optimum, *, shift=0):
    """Return a landscape with one optimum; that of shorter runs lies ``shift`` places further up."""

    def loss(run):
        away = 0 if run.steps == STEPS else shift
        return 1 + (run.point.lr - optimum.lr - away) ** 2 + (run.point.adamw_lr - optimum.adamw_lr - away) ** 2

    return loss


@given(lr=PLACES, adamw_lr=PLACES, has_start=st.booleans(), shift=st.integers(0, 2))
def test_the_optimum_is_found_wherever_it_is(lr, adamw_lr, has_start, shift):
    optimum = Point(lr, adamw_lr)
    search = Search(steps=STEPS, budget=60, has_start=has_start)
    assert spend(search, bowl(optimum, shift=shift)) == optimum
    assert search.open_ends(optimum) == []


@given(lr=PLACES, adamw_lr=PLACES, has_start=st.booleans(), budget=st.integers(LEAST, 30), steps=st.integers(1, 100))
def test_the_budget_is_kept_and_the_best_was_run_at_full_length(lr, adamw_lr, has_start, budget, steps):
    search = Search(steps=steps, budget=budget, has_start=has_start)
    best = spend(search, bowl(Point(lr, adamw_lr)))
    assert search.spent <= budget * steps
    full = {run.point: loss for run, loss in search.losses.items() if run.steps == steps and run.order == 0}
    assert full[best] == min(full.values())
    assert not has_start or START in full


@settings(max_examples=50)
@given(st.data())
def test_no_landscape_keeps_it_from_ending_within_the_budget(data):
    values = {}

    def loss(run):
        if run not in values:
            values[run] = data.draw(st.sampled_from([math.inf, 1.0, 2.0, 3.0, -1.0]))
        return values[run]

    search = Search(steps=STEPS, budget=12)
    spend(search, loss)
    assert search.spent <= 12 * STEPS


@pytest.mark.parametrize("has_start", [True, False])
def test_where_large_rates_diverge_it_goes_down_until_they_do_not(has_start):
    optimum = Point(-5, -4)
    inside = bowl(optimum)

    def loss(run):
        return math.inf if max(run.point.lr, run.point.adamw_lr) > -2 else inside(run)

    assert spend(Search(steps=STEPS, budget=40, has_start=has_start), loss) == optimum


def test_short_runs_come_first_and_save_most_of_the_way():
    search = Search(steps=STEPS, budget=60)
    spend(search, bowl(Point(6, 6)))
    lengths = [run.steps for run in search.losses]
    assert lengths == sorted(lengths)
    assert set(lengths) == {STEPS // 4, STEPS}
    chosen = [run for run in search.losses if run.steps == STEPS and run.order == 0]
    assert len(chosen) == 6  # the best, its four neighbours, the start


def test_the_best_and_the_start_are_repeated_on_the_same_other_orders():
    search = Search(steps=STEPS, budget=60)
    best = spend(search, bowl(Point(2, 1)))
    repeated = [run for run in search.losses if run.order]
    assert repeated == [Run(point, STEPS, order) for order in (1, 2) for point in (best, START)]


def test_nothing_is_repeated_where_the_start_is_best():
    search = Search(steps=STEPS, budget=60)
    assert spend(search, bowl(START)) == START
    assert not any(run.order for run in search.losses)


def test_a_budget_that_ends_early_names_the_sides_that_are_open():
    search = Search(steps=STEPS, budget=LEAST)
    best = spend(search, bowl(Point(7, 7)))
    assert ("lr", 1) in search.open_ends(best)


def test_one_knob_is_followed_alone():
    search = Search(steps=STEPS, budget=30, knobs=("lr",), has_start=False)
    best = spend(search, bowl(Point(3, 5)))
    assert best == Point(3, 0)
    assert {run.point.adamw_lr for run in search.losses} == {0}


def test_too_small_a_budget_is_refused():
    with pytest.raises(ValueError, match="budget=3 must be at least 4 runs"):
        Search(steps=STEPS, budget=3)


def test_the_start_is_left_as_it_was_given():
    start = {"lr": 0.00123456, "adamw_lr": 1e-3}
    assert rates_at(Point(adamw_lr=1), start) == {"lr": 0.00123456, "adamw_lr": 0.002}
