"""The same Llama, data and schedule through every adapter, in one process, under DDP and FSDP2: the same weights."""

import pytest
import torch

from tests.adapters import trainer_runs, training
from tests.models import max_difference
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def expected():
    return training.run_plain_loop()


def test_plain_loop_moves_every_weight(expected):
    for name, parameter in training.float64_llama().named_parameters():
        assert not torch.equal(parameter, expected[name])


def test_accelerate_equals_the_plain_loop(expected):
    assert max_difference(training.run_accelerate(), expected) < 1e-6


def test_trainer_equals_the_plain_loop(expected, tmp_path):
    assert max_difference(training.run_trainer(tmp_path), expected) < 1e-6


def test_lightning_equals_the_plain_loop(expected, tmp_path):
    assert max_difference(training.run_lightning(tmp_path), expected) < 1e-6


def every_runner(folder):
    """Run all under the process group that exists; one spawn pays for the imports of all."""
    sharded_trainer = trainer_runs.train_fsdp2(folder, training.float64_llama())
    assert sharded_trainer.fsdp2
    assert all("Shard" in placement for placement in sharded_trainer.placements.values())
    return {
        "ddp": training.run_ddp(),
        "lightning": training.run_lightning(folder, ranks=2),
        "accelerate": training.run_accelerate(ranks=2),
        "trainer": training.run_trainer(folder, ranks=2),
        "lightning, sharded": training.run_lightning_fsdp2(folder),
        "accelerate, sharded": training.run_accelerate_fsdp2(),
        "trainer, sharded": sharded_trainer.weights,
    }


def test_two_processes_equal_one_with_the_same_global_batch(expected, tmp_path):
    first, second = run_ranks(every_runner, 2, tmp_path)
    for name, result in first.items():
        assert max_difference(result, second[name]) == 0, f"{name}: the ranks disagree"
        assert max_difference(result, expected) < 1e-6, f"{name}: differs from one process"
