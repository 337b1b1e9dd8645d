"""plan_exchange: what a step costs every rank, before there are any."""

import math
import re

import pytest
import torch
from torch import nn

from normuon_plugins import plan_exchange, plan_parameters


def llama(hidden, intermediate, key_value, layers):
    """Return the shapes of a Llama's hidden matrices."""
    shapes = (
        [(hidden, hidden)] * 2 + [(key_value, hidden)] * 2 + [(intermediate, hidden)] * 2 + [(hidden, intermediate)]
    )
    return [(shape, "o i") for shape in shapes * layers]


LLAMA_3_8B = llama(4096, 14336, 1024, 32)


@pytest.mark.parametrize("ranks", [8, 64, 256])
def test_work_is_even_wherever_whole_matrices_allow_it(ranks):
    report = plan_exchange(LLAMA_3_8B, shards=ranks)
    assert len(report.multiplications) == ranks
    assert report.imbalance <= max(1.10, report.least_imbalance)
    # At 256 ranks there are fewer matrices than ranks, and the largest one alone is 2.1 times the mean.
    assert (report.least_imbalance > 1.10) is (ranks == 256)


def test_the_shard_travels_once_out_and_once_back():
    report = plan_exchange(LLAMA_3_8B, shards=64)
    numel = sum(shape[0] * shape[1] for shape, _ in LLAMA_3_8B)
    mean = sum(report.bytes_sent) / 64
    assert mean == sum(report.bytes_received) / 64
    assert 2 * 2 * numel / 64 * 63 / 64 < mean < 2.01 * 2 * numel / 64
    assert report.collectives == 2 * report.rounds


def test_replicas_gather_nothing_and_receive_everything_once():
    shapes = [((64, 32), "o i")] * 16
    report = plan_exchange(shapes, shards=1, replicas=4)
    assert report.collectives == 1
    # of each matrix the direction, the neuron state, and the mean square of its gradient
    assert report.bytes_received == [12 * (64 * 32 * 2 + 64 * 4 + 4)] * 4
    assert report.bytes_sent == report.bytes_received


def test_hsdp_gathers_within_a_replica_only():
    shapes = [((64, 32), "o i")] * 16
    rule = {"adjust_lr_fn": "match_rms_adamw"}
    flat, hybrid = plan_exchange(shapes, shards=8, **rule), plan_exchange(shapes, shards=4, replicas=2, **rule)
    assert max(hybrid.multiplications) == max(flat.multiplications)
    one_way = 16 * (64 * 32 * 2 + 64 * 4)
    assert sum(flat.bytes_sent) == 2 * one_way * 7 // 8
    # Out: what three of four ranks hold. Back: to three ranks of the owner's replica and to four of the other one.
    assert sum(hybrid.bytes_sent) == one_way * 3 // 4 + one_way * (3 + 4) // 4


@pytest.mark.parametrize("mesh", [{"shards": 8}, {"shards": 4, "replicas": 2}, {"shards": 1, "replicas": 4}])
def test_matching_progress_sends_no_message_more_and_a_few_bytes(mesh):
    fixed = plan_exchange(LLAMA_3_8B, adjust_lr_fn="match_rms_adamw", **mesh)
    matched = plan_exchange(LLAMA_3_8B, **mesh)
    assert (matched.collectives, matched.rounds) == (fixed.collectives, fixed.rounds)
    assert matched.multiplications == fixed.multiplications
    ranks = len(fixed.bytes_sent)
    more = sum(matched.bytes_sent) - sum(fixed.bytes_sent)
    # Per matrix: the sum of squares from every other rank of a replica, and the mean square to all other ranks.
    assert more == len(LLAMA_3_8B) * 4 * ((mesh["shards"] - 1) + (ranks - 1))


def test_experts_on_their_dimension_cost_no_message():
    report = plan_exchange([((8, 64, 32), "e o i")] * 4, shards=8)
    assert (report.collectives, report.rounds) == (0, 0)
    assert report.bytes_sent == [0] * 8
    assert report.imbalance == 1


def test_a_plan_of_a_model_without_weights_is_enough():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64), nn.LayerNorm(64))
    report = plan_exchange(plan_parameters(model), shards=2)
    assert report.multiplications == [5 * (2 * 64 * 64 * 128 + 64**3)] * 2
    assert "2 ranks" in str(report)


def documented(root, page):
    """Yield the rows of a page's table of costs: shapes, ranks, the report, and what the page shows."""
    models = {"1B": llama(2048, 5632, 256, 22), "8B": LLAMA_3_8B, "70B": llama(8192, 28672, 1024, 80)}
    rows = re.findall(r"^\| (1B|8B|70B) \| (\d+) \| (.+) \|$", (root / "docs" / page).read_text(), re.MULTILINE)
    assert len(rows) == 12
    for model, ranks, shown in rows:
        yield models[model], int(ranks), plan_exchange(models[model], shards=int(ranks)), shown


def test_the_table_of_exchanges_is_what_the_report_says(root):
    for _, _, report, shown in documented(root, "distributed.md"):
        sent, received = max(report.bytes_sent) / 2**20, max(report.bytes_received) / 2**20
        assert shown == (
            f"{max(report.multiplications) / 1e12:.2f} | {report.imbalance:.2f} ({report.least_imbalance:.2f})"
            f" | {sent:.0f} | {received:.0f} | {report.collectives}"
        )


def test_the_table_of_growing_cost_is_what_the_report_says(root):
    """An all-gather receives every matrix in bfloat16; a training step multiplies thrice by token and parameter."""
    for shapes, ranks, report, shown in documented(root, "performance.md"):
        entries = sum(math.prod(shape) for shape, _ in shapes)
        busiest, everything = max(report.multiplications), sum(report.multiplications)
        training = 3 * entries * 8192 / 100
        assert shown == (
            f"{busiest / 1e12:.2f} | {everything / 1e12:.0f} | {max(report.bytes_received) / 2**20:.0f}"
            f" | {2 * entries * (1 - 1 / ranks) / 2**20:.0f}"
            f" | {busiest / training:.2f} % | {everything / training:.1f} %"
        )


def test_nothing_to_plan_is_refused():
    with pytest.raises(ValueError, match="0 matrices, shards=2"):
        plan_exchange([], shards=2)
    with pytest.raises(ValueError, match="shards=0"):
        plan_exchange(LLAMA_3_8B, shards=0)
