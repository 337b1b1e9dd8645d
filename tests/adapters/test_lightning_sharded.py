"""Lightning in several processes: FSDP2, tensor parallel, both, DDP; against one process and after a resume."""

import pytest
import torch
from torch.utils.data import DataLoader

from tests.adapters import training
from tests.adapters.lightning_runs import CLIP_VALUE, four_ranks, two_ranks
from tests.models import max_difference, tiny_llama

MATRICES = {name for name, _ in training.float64_llama().named_parameters() if "_proj" in name}
RESUMED = ["ddp", "fsdp2 distributed", "fsdp2 full", "tp distributed", "tp full"]


@pytest.fixture(scope="module")
def two():
    return two_ranks()


@pytest.fixture(scope="module")
def four():
    return four_ranks()


@pytest.fixture(scope="module")
def expected():
    return training.run_plain_loop()


@pytest.mark.parametrize("kind", ["fsdp2", "tp"])
def test_two_ranks_equal_one_process_with_the_same_global_batch(two, expected, kind):
    for rank in two:
        assert max_difference(rank[kind]["weights"], expected) < 1e-6


@pytest.mark.parametrize("kind", ["fsdp2", "tp"])
def test_two_ranks_share_the_step_and_move_every_weight(two, kind):
    for name, before in training.float64_llama().named_parameters():
        assert not torch.equal(two[0][kind]["weights"][name], before)
    assert two[0][kind]["shares_work"]


def test_fsdp2_shards_every_parameter_and_tensor_parallel_the_projections(two, expected):
    assert two[0]["fsdp2"]["sharded"] == expected.keys()
    assert two[0]["tp"]["sharded"] == MATRICES


def test_bf16_mixed_under_fsdp2_is_near_one_process(two, tmp_path):
    """Rounding of 2**-8 becomes a difference of some hundredths in six steps; the steps change weights by 0.45."""
    module = training.lightning_module(tiny_llama(), scheduler=None, warmup=0, ns_dtype="float32")
    loader = DataLoader(training.examples(), training.GLOBAL_BATCH)
    training.lightning_trainer(tmp_path, precision="bf16-mixed").fit(module, loader)
    assert max_difference(two[0]["mixed"]["bf16"], training.weights(module.model)) < 0.15
    assert max_difference(two[0]["mixed"]["bf16"], tiny_llama()) > 0.3


def test_16_mixed_under_ddp_skips_the_same_steps_on_every_rank(two):
    first, second = (rank["mixed"] for rank in two)
    assert 0 < first["skipped"] == second["skipped"] < training.STEPS
    assert max_difference(first["fp16"], second["fp16"]) == 0


@pytest.mark.parametrize("kind", RESUMED)
def test_two_resumed_ranks_equal_the_uninterrupted_run(two, kind):
    for rank in two:
        whole, resumed = rank["resumed"][kind]
        assert max_difference(resumed, whole) == 0


def test_four_ranks_shard_over_both_dimensions_of_the_mesh(four, expected):
    assert four[0]["clipped by norm"]["sharded"] == expected.keys()
    assert four[0]["clipped by norm"]["dimensions"] == 2
    assert four[0]["clipped by norm"]["shares_work"]


def test_four_ranks_clipped_by_our_norm_equal_one_process_clipped(four, expected):
    for rank in four:
        assert max_difference(rank["clipped by norm"]["weights"], expected) < 1e-6


def test_four_ranks_clipped_by_value_equal_one_process_clipped(four, tmp_path):
    module = training.lightning_module(training.float64_llama())
    options = {"gradient_clip_val": CLIP_VALUE, "gradient_clip_algorithm": "value"}
    loader = DataLoader(training.examples(), training.GLOBAL_BATCH)
    training.lightning_trainer(tmp_path, **options).fit(module, loader)
    assert max_difference(four[0]["clipped by value"]["weights"], training.weights(module.model)) < 1e-6


@pytest.mark.parametrize("kind", ["distributed", "full"])
def test_four_resumed_ranks_equal_the_uninterrupted_run(four, kind):
    for rank in four:
        whole, resumed = rank["resumed"][kind]
        assert max_difference(resumed, whole) == 0
