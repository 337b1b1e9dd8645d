"""Fused projections: every block gets the update that it would get as a parameter of its own.

A fused model and its unfused re-statement start from the same weights and see the same batches; after ten steps the
weights are the same. In float64, so that only the mathematics shows.
"""

import itertools
import re

import pytest
import torch
from torch.utils.data import DataLoader

from normuon_plugins import NorMuon, build_normuon, plan_parameters
from normuon_plugins.core.layout import parse_layout
from tests.models import max_difference, token_blocks
from tests.unfused import CASES, dealt, head_by_head, plain_groups

STEPS = 10
BATCH = 4
OPTIONS = {
    "lr": 0.02,
    "weight_decay": 0.1,
    "nesterov": True,
    "adamw_lr": 0.003,
    # The gradient of a key's bias is zero but for rounding, which AdamW would scale up to a step of its own.
    "adamw_eps": 1e-3,
    "ns_dtype": "float64",
    # Keeps no number in float32 per matrix, so that the weights agree in float64.
    "adjust_lr_fn": "match_rms_adamw",
}
# What other neurons or blocks make of the weights is 0.02 or more; what float64 makes of them, less than 1e-14.
ANOTHER_UPDATE = 0.01

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
every_case_with_heads = pytest.mark.parametrize(
    "case", [case for case in CASES.values() if case.heads], ids=[name for name, case in CASES.items() if case.heads]
)
# two blocks of one size, whose order no shape tells
EXCHANGES = [
    pytest.param(case, ending, first, second, id=f"{name}: {ending} {first} {second}")
    for name, case in CASES.items()
    for ending, layout in case.layouts.items()
    for first, second in itertools.combinations(range(len(parse_layout(layout).blocks)), 2)
    if parse_layout(layout).blocks[first] == parse_layout(layout).blocks[second]
]


def train(model, optimizer):
    for batch in DataLoader(token_blocks(STEPS * BATCH), BATCH):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def train_fused(case, **plan_options):
    """Return the fused model after ten steps with the groups of the plan, unfused for the comparison."""
    model = case.build()
    return case.unfuse(train(model, build_normuon(model, **OPTIONS, **plan_options)))


def train_unfused(case, heads=None):
    """Return the unfused model after ten steps with groups written by hand."""
    model = case.unfuse(case.build())
    model = head_by_head(model, heads) if heads else model
    return train(model, NorMuon(plain_groups(model), **OPTIONS))


def logits(model):
    with torch.no_grad():
        return model(**next(iter(DataLoader(token_blocks(BATCH), BATCH)))).logits


def expected_layouts(case, plan):
    """Return name -> layout of the fused parameters in ``plan``; every name in ``case.layouts`` must occur."""
    expected = {
        row.name: layout for row in plan for ending, layout in case.layouts.items() if row.name.endswith(ending)
    }
    assert set(expected.values()) == set(case.layouts.values())
    return expected


def without_blocks(layout):
    return re.sub(r"[=%][\d*+]+", "", layout)


@every_case
def test_both_models_compute_the_same(case):
    model = case.build()
    torch.testing.assert_close(logits(case.unfuse(model)), logits(model), rtol=0.0, atol=1e-6)


@pytest.mark.parametrize(("case", "ending", "first", "second"), EXCHANGES)
def test_two_blocks_exchanged_compute_something_else(case, ending, first, second):
    # so that the test above proves which rows have which role
    model = case.build()
    right = logits(model)
    parameter = next(parameter for name, parameter in model.named_parameters() if name.endswith(ending))
    layout = parse_layout(case.layouts[ending])
    neurons = layout.axes.index("o")
    order = torch.arange(parameter.shape[neurons])
    blocks = dealt(order, *layout.blocks)
    order[torch.cat([blocks[first], blocks[second]])] = torch.cat([blocks[second], blocks[first]])
    with torch.no_grad():
        parameter.copy_(parameter.index_select(neurons, order))
    assert (logits(model) - right).abs().max() > 1e-4


@every_case
def test_the_plan_finds_the_blocks(case):
    plan = plan_parameters(case.build())
    expected = expected_layouts(case, plan)
    assert {row.name: row.layout for row in plan if row.name in expected} == expected
    assert {row.layout for row in plan if row.name not in expected} <= {"o i", "i o", None}


@every_case
def test_blocks_train_as_parameters_of_their_own(case):
    assert max_difference(train_fused(case), train_unfused(case)) < case.tolerance


@every_case_with_heads
def test_per_head_trains_every_head_as_a_parameter_of_its_own(case):
    fused = head_by_head(train_fused(case, per_head=True), case.heads)
    assert max_difference(fused, train_unfused(case, heads=case.heads)) < case.tolerance


@every_case
def test_without_split_fused_matrices_stay_whole(case):
    plan = plan_parameters(case.build(), split_fused=False)
    expected = {name: without_blocks(layout) for name, layout in expected_layouts(case, plan).items()}
    assert {row.name: row.layout for row in plan if row.name in expected} == expected


@every_case
def test_whole_matrices_train_otherwise(case):
    assert max_difference(train_fused(case, split_fused=False), train_unfused(case)) > ANOTHER_UPDATE


@pytest.mark.parametrize(
    ("name", "ending", "layout"),
    [
        ("Phi-3", "qkv_proj.weight", "o=20+20+40 i"),
        ("GPT-NeoX", "query_key_value.weight", "o=40+40+40 i"),
        ("Falcon, interleaved by group", "query_key_value.weight", "o%10+10+20 i"),
        ("Mixtral", "experts.gate_up_proj", "e o%1+1 i"),
        ("gpt-oss", "experts.gate_up_proj", "e i o=14+14"),
        ("DeepSeek-V3", "kv_b_proj.weight", "o%8+6 i"),
        ("DeepSeek-V3", "experts.down_proj", "e i o"),
        ("Llama 4", "experts.down_proj", "e o i"),
    ],
)
def test_rows_of_the_wrong_block_or_axis_train_otherwise(name, ending, layout):
    wrong = train_fused(CASES[name], overrides={f"{re.escape(ending)}$": layout})
    assert max_difference(wrong, train_unfused(CASES[name])) > ANOTHER_UPDATE
