"""The benchmark as a user runs it, on tiny matrices, and what it counts against counts by hand."""

import json
import os
import statistics
import subprocess
import sys

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from normuon_plugins import plan_exchange, plan_parameters

# Two square matrices, a wide one, and a stack of three experts.
SHAPES = "32x32*2,16x48,3x24x16"
ENTRIES = 2 * 32 * 32 + 16 * 48 + 3 * 24 * 16
ROWS = 2 * 32 + 16 + 3 * 24
TENSORS = 4
# Five steps of X X^T, its square, and their product with X: 2 s s l + s^3.
DENSE = 5 * (2 * 3 * 32**3 + (2 * 16 * 16 * 48 + 16**3) + 3 * (2 * 16 * 16 * 24 + 16**3))
CALLED = ["ours", "ours, muon", "torch.optim.Muon", "torch.optim.AdamW fused"]


@pytest.fixture(scope="module")
def run(root, tmp_path_factory):
    """The result of a run beside a peer that raises, the folder that it wrote, and what it printed."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "dion.py").write_text("def Muon(*_, **__): raise RuntimeError('no [kernel] here')\n")
    command = [sys.executable, str(root / "benchmarks" / "step.py"), "--shapes", SHAPES, "--repetitions", "3"]
    command += ["--only", "^ours$|^ours, muon$|^torch|^dion.Muon$|^authors", "--threads", "1", "--out", "out"]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "out" / "shapes.json").read_text()), folder / "out", done.stdout


@pytest.fixture(scope="module")
def rows(run):
    return {row["name"]: row for row in run[0]["contenders"]}


@pytest.fixture
def modules(root, monkeypatch):
    monkeypatch.syspath_prepend(str(root / "benchmarks"))


def test_result_says_on_what_it_was_measured(run):
    result, _, _ = run
    machine = result["machine"]
    assert (machine["torch"], machine["threads"]) == (torch.__version__, 1)
    assert machine["name"]
    assert machine["cores"] >= 1
    assert "--repetitions 3" in result["command"]
    assert result["parameters"] == ENTRIES
    assert result["shapes"] == "3x24x16,16x48,32x32*2"


def test_every_time_is_kept_and_medians_are_theirs(run, rows):
    assert list(rows) == CALLED
    for row in [*rows.values(), run[0]["matmul"]]:
        assert len(row["seconds"]) == 3
        assert min(row["seconds"]) > 0
        assert row["median"] == statistics.median(row["seconds"])


def test_ratios_are_to_the_fastest_peer_that_orthogonalizes(rows):
    for row in rows.values():
        assert row["ratio_to_fastest_peer"] == row["median"] / rows["torch.optim.Muon"]["median"]


def test_rates_follow_from_times_and_multiplications(run, rows):
    matmul = run[0]["matmul"]["flops"]
    assert matmul == pytest.approx(2 * DENSE / run[0]["matmul"]["median"])
    for row in rows.values():
        dense = 2 * DENSE / row["median"] if row["orthogonalizes"] else None
        assert row["dense_flops"] == pytest.approx(dense)
        assert (row["needed_flops"] is not None) is row["ours"]
    assert rows["torch.optim.Muon"]["fraction_of_matmul"] == pytest.approx(
        2 * DENSE / matmul / rows[CALLED[2]]["median"]
    )
    assert rows["ours"]["fraction_of_matmul"] == pytest.approx(rows["ours"]["needed_flops"] / matmul)


def test_state_bytes_equal_a_count_by_hand(rows):
    """In float32: momentum and, without its use too, a number for each neuron; two moments, and each tensor's step."""
    expected = [4 * (ENTRIES + ROWS), 4 * (ENTRIES + ROWS), 4 * ENTRIES, 4 * (2 * ENTRIES + TENSORS)]
    assert [rows[name]["state_bytes"] for name in CALLED] == expected
    assert rows["ours"]["state_ratio_to_adamw"] == expected[0] / (8 * ENTRIES)


def test_transient_memory_of_muon_is_of_the_size_of_its_products(rows):
    """At least one matrix and its Gram matrix in bfloat16; AdamW's kernel works in place."""
    assert rows["torch.optim.Muon"]["transient_bytes"] >= 2 * 2 * 32 * 32
    assert rows["torch.optim.AdamW fused"]["transient_bytes"] < 2 * 32 * 32


def test_peers_that_are_absent_or_raise_are_in_the_result_and_on_the_screen(run):
    result, _, printed = run
    assert result["absent"] == {"authors' NorMuon": "normuon"}
    assert result["failed"] == {"dion.Muon": "RuntimeError: no [kernel] here"}
    assert "absent authors' NorMuon" in printed
    assert "failed dion.Muon: RuntimeError: no [kernel] here" in printed


def test_updates_are_orthogonal_at_every_size_that_was_judged(run, rows):
    for name in CALLED[:3]:
        assert [found["shape"] for found in rows[name]["accuracy"]] == [[32, 32], [24, 16]]
        for found in rows[name]["accuracy"]:
            assert 0.6 < found["smallest"] < found["largest"] < 1.5
            assert 0.95 < found["cosine"] < 1.0001
    assert rows[CALLED[3]]["accuracy"] == []


def test_traffic_stands_beside_that_of_gathering_everything(run):
    for row, ranks in zip(run[0]["exchange"], (8, 64), strict=True):
        assert row["ranks"] == ranks
        assert row["all_gather_bytes_received"] == 2 * ENTRIES * (ranks - 1) / ranks
        assert 0 < row["bytes_received"] < row["all_gather_bytes_received"]


def test_plot_is_drawn(run):
    assert (run[1] / "shapes.png").read_bytes().startswith(b"\x89PNG")


def test_judge_knows_the_exact_factor_from_the_gradient(modules):
    from accuracy import CONDITION, Oracle

    oracle = Oracle((24, 16))
    exact, untouched = oracle.judge(3 * oracle.factor), oracle.judge(oracle.gradient)
    assert (exact.smallest, exact.largest, exact.cosine) == pytest.approx((1, 1, 1))
    assert untouched.largest / untouched.smallest == pytest.approx(CONDITION)
    assert untouched.cosine < 0.8


def test_every_repetition_begins_with_another_contender(modules):
    from measure import interleave

    order = []
    runs = {name: lambda name=name: order.append(name) or float(len(order)) for name in "abc"}
    assert interleave(runs, range(3)) == ({"a": [1, 6, 8], "b": [2, 4, 9], "c": [3, 5, 7]}, {})
    assert "".join(order) == "abcbcacab"


def test_what_an_optimizer_keeps_is_counted_once_in_any_container(modules):
    from memory import state_bytes

    parameter = torch.nn.Parameter(torch.zeros(4, 4))
    optimizer = torch.optim.SGD([parameter])
    buffer = torch.zeros(8, dtype=torch.bfloat16)
    optimizer.state[parameter] = {0: {"momentum": buffer, "view": buffer[:2]}, "more": [torch.zeros(3)], "step": 1}
    assert state_bytes(optimizer) == 8 * 2 + 3 * 4


# The Llama of https://arxiv.org/abs/2510.05491, and Llama-3-8B's config on the hub.
LLAMA_1B = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_key_value_heads": 4}
LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_key_value_heads": 8}


@pytest.mark.parametrize(
    ("name", "model_class", "config"),
    [
        ("gpt2", GPT2LMHeadModel, GPT2Config()),
        ("llama-1.1b", LlamaForCausalLM, LlamaConfig(**LLAMA_1B, num_attention_heads=32)),
        ("llama-3-8b", LlamaForCausalLM, LlamaConfig(**LLAMA_8B, num_attention_heads=32)),
        ("mixtral", MixtralForCausalLM, MixtralConfig()),
    ],
)
def test_shape_lists_have_the_entries_and_the_work_of_the_models(modules, name, model_class, config):
    from shapes import MODELS, entries

    with torch.device("meta"):
        plan = [row for row in plan_parameters(model_class(config)) if row.layout is not None]
    shapes = MODELS[name].shapes
    assert entries(shapes) == sum(row.parameter.numel() for row in plan)
    listed = [(shape, "e o i" if len(shape) == 3 else "o i") for shape in shapes]
    assert plan_exchange(listed, shards=1).multiplications == plan_exchange(plan, shards=1).multiplications


@pytest.mark.parametrize("text", ["512", "512x0", "512x512*", "2x2x2x2", "512 x 512", ""])
def test_a_word_that_is_no_shape_is_refused(modules, text):
    from shapes import parse_shapes

    with pytest.raises(ValueError, match="is no shape; write 512x2048"):
        parse_shapes(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "nobody"], "'nobody' names none of"),
        (["--repetitions", "0"], "take numbers from 1"),
        (["--shapes", "8x8", "--layers", "2"], "--layers goes with --model"),
        (["--shapes", "8"], "'8' is no shape; write"),
    ],
)
def test_impossible_arguments_end_with_a_message(modules, arguments, message, capsys):
    from step import parse_arguments

    with pytest.raises(SystemExit):
        parse_arguments(arguments)
    assert message in capsys.readouterr().err
