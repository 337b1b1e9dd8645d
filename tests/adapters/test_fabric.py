"""Fabric: setup_normuon in one process and in two, resumed; joint setup refused where it would train nothing."""

import pytest
from lightning.fabric import Fabric
from lightning.fabric.strategies import FSDPStrategy

from normuon_plugins.lightning import setup_normuon
from tests.adapters import training
from tests.adapters.lightning_runs import make_fabric, resume_fabric, train_fabric, two_ranks
from tests.models import max_difference, tiny_llama, token_blocks


@pytest.fixture(scope="module")
def two():
    return two_ranks()


@pytest.fixture(scope="module")
def expected():
    return training.run_plain_loop()


@pytest.mark.parametrize("joint", [False, True])
def test_one_process_equals_a_plain_loop(expected, joint):
    assert max_difference(train_fabric(make_fabric(), joint=joint)["weights"], expected) < 1e-6


def test_one_process_saved_and_loaded_equals_the_uninterrupted_run(tmp_path):
    whole, resumed = resume_fabric(make_fabric, tmp_path / "half.ckpt")
    assert max_difference(resumed, whole) == 0


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_ranks_equal_one_process_and_share_the_step(two, expected, kind):
    for rank in two:
        assert max_difference(rank["fabric"][kind]["weights"], expected) < 1e-6
        assert rank["fabric"][kind]["shares_work"]
        assert rank["fabric"][kind]["sharded"] is (kind == "fsdp2")


@pytest.mark.parametrize("kind", ["ddp", "distributed", "full"])
def test_two_ranks_saved_and_loaded_equal_the_uninterrupted_run(two, kind):
    for rank in two:
        whole, resumed = rank["fabric resumed"][kind]
        assert max_difference(resumed, whole) == 0


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_parameters_have_the_names_of_the_model_without_a_wrapper(two, expected, kind):
    assert set(two[0]["fabric"][kind]["names"]) == expected.keys()


def test_joint_setup_under_ddp_trains(two, expected):
    assert max_difference(two[0]["fabric joint ddp"]["weights"], expected) < 1e-6


def test_joint_setup_under_model_parallel_is_refused_with_the_right_call(two):
    for rank in two:
        assert "no longer in the model" in rank["fabric joint fsdp2"]
        assert "fabric.setup_module(model)" in rank["fabric joint fsdp2"]


def test_metrics_are_those_of_the_optimizer_inside():
    fabric = make_fabric()
    model, optimizer = setup_normuon(fabric, tiny_llama(), lr=0.1)
    fabric.backward(model(**{name: value[None] for name, value in token_blocks(1)[0].items()}).loss)
    optimizer.step()
    assert "normuon/update_rms" in optimizer.metrics()
    assert optimizer.metrics(synchronize=True) == optimizer.optimizer.metrics(synchronize=True)


def test_fsdp1_is_refused():
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric._strategy = FSDPStrategy()  # Fabric itself wants a GPU for it
    with pytest.raises(ValueError, match=r"FSDPStrategy leaves flat shards of them\. Use ModelParallelStrategy"):
        setup_normuon(fabric, tiny_llama())
