"""Accelerate in two and four processes: FSDP2, HSDP and DDP against one process, checkpoints, wrong orders of calls."""

import pytest
import torch
import torch.distributed as dist
from accelerate import ParallelismConfig
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from normuon_plugins import build_normuon
from tests.adapters import accelerate_runs as runs
from tests.adapters.training import GLOBAL_BATCH, OPTIONS, STEPS, cosine, examples, float64_llama
from tests.models import max_difference, tiny_llama
from tests.ranks import run_ranks

SHARDED, FULL = {"state_dict_type": "SHARDED_STATE_DICT"}, {"state_dict_type": "FULL_STATE_DICT"}
# A schedule in steps of the optimizer, whatever the number of processes.
OWN_STEPS = {"step_scheduler_with_optimizer": False}


def at_four(folder):
    hsdp = ParallelismConfig(dp_replicate_size=2, dp_shard_size=2)
    return {
        "sharded": runs.resumed(lambda: runs.sharding(SHARDED, **OWN_STEPS), folder / "sharded-4"),
        "full": runs.resumed(lambda: runs.sharding({**FULL, **runs.WRAP}, **OWN_STEPS), folder / "full-4"),
        "hsdp": runs.resumed(lambda: runs.sharding(SHARDED, parallelism_config=hsdp), folder / "hsdp-4"),
    }


def at_two(folder):
    accumulate = {"gradient_accumulation_steps": 2}
    rank = dist.get_rank()
    facts = {
        "sharded": runs.resumed(lambda: runs.sharding({**SHARDED, **runs.WRAP}), folder / "sharded-2"),
        "full": runs.resumed(lambda: runs.sharding(FULL), folder / "full-2"),
        "ddp": runs.resumed(lambda: runs.replicating(**accumulate), folder / "ddp-2"),
        "accumulated": run(runs.sharding(**accumulate)),
        # The model of every rank but the first is another one.
        "ram-efficient": run(runs.sharding({"cpu_ram_efficient_loading": True}), tiny_llama(seed=rank).double()),
        "offloaded": run(runs.sharding({"cpu_offload": CPUOffloadPolicy(pin_memory=False)})),
        "recomputed": run(runs.sharding({**runs.WRAP, "activation_checkpointing": True})),
        "tied": run(runs.sharding(runs.WRAP), runs.tied_llama()),
        "tied, ram-efficient": run(runs.sharding({"cpu_ram_efficient_loading": True}), runs.tied_llama()),
        "frozen": run(runs.sharding(runs.WRAP), runs.half_frozen_llama()),
        "bf16": run(runs.sharding(runs.WRAP, mixed_precision="bf16"), tiny_llama(), ns_dtype=None),
        "bf16 by hand": bf16_by_hand(),
        "new head": runs.new_head(folder / "bert"),
        "orders": runs.orders(),
        "refusals": runs.refusals(),
        "fallback": runs.fallback(),
        "metrics": runs.metrics(folder / "logs"),
    }
    for kind, options in (("sharded", SHARDED), ("full", FULL)):
        other = runs.Run(runs.sharding(options, **OWN_STEPS), tiny_llama(seed=7).double())
        other.accelerator.load_state(str(folder / f"{kind}-4"))
        facts[f"{kind}, from four"] = {"loaded": other.snapshot(), "resumed": other.train(STEPS // 2).facts()}
    return facts


def run(accelerator, model=None, **options):
    return runs.Run(accelerator, float64_llama() if model is None else model, **options).train().facts()


def bf16_by_hand():
    """What Accelerate's bf16 does, with torch alone."""
    dtype = torch.bfloat16
    model = tiny_llama()
    fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=dtype, output_dtype=dtype))
    optimizer = build_normuon(model, **{**OPTIONS, "ns_dtype": None})
    scheduler = LambdaLR(optimizer, cosine)
    ranks = dist.get_world_size()
    for batch in list(DataLoader(examples(), GLOBAL_BATCH // ranks))[dist.get_rank() :: ranks]:
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), runs.CLIP)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return runs.whole_weights(model)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("accelerate")


@pytest.fixture(scope="module")
def four(folder):
    return run_ranks(at_four, 4, folder)[0]


@pytest.fixture(scope="module")
def two(folder, four):  # after four, whose checkpoints it loads
    return run_ranks(at_two, 2, folder)


@pytest.fixture(scope="module")
def expected():
    frozen, tied = runs.half_frozen_llama(), runs.tied_llama()
    return {None: runs.one_process(float64_llama()), "frozen": runs.one_process(frozen), "tied": runs.one_process(tied)}


TRAINED = ["sharded", "full", "ddp", "accumulated", "ram-efficient", "offloaded", "recomputed", "frozen"]
RUNS = [*((2, name) for name in [*TRAINED, "tied", "tied, ram-efficient"]), (4, "sharded"), (4, "full"), (4, "hsdp")]
RESUMED = [(2, "sharded"), (2, "full"), (2, "ddp"), (4, "sharded"), (4, "full"), (4, "hsdp")]


@pytest.fixture
def trained(two, four):
    """Return what a run of six steps ended with, by the number of processes and its name."""

    def find(ranks, name):
        facts = (two[0] if ranks == 2 else four)[name]
        return facts.get("uninterrupted", facts)

    return find


@pytest.fixture
def alone(expected):
    """Return what one process ends with, by the name of the run."""
    return lambda name: expected[next((key for key in expected if key and key in name), None)]


@pytest.mark.parametrize(("ranks", "name"), RUNS)
def test_weights_are_those_of_one_process(trained, alone, ranks, name):
    assert max_difference(trained(ranks, name)["weights"], alone(name)["weights"]) < 1e-6


@pytest.mark.parametrize(("ranks", "name"), RUNS)
def test_clipping_returns_the_norm_of_one_process(trained, alone, ranks, name):
    assert trained(ranks, name)["norms"] == pytest.approx(alone(name)["norms"], rel=1e-6)


@pytest.mark.parametrize(("ranks", "name"), RUNS)
def test_learning_rates_are_those_of_one_process(trained, alone, ranks, name):
    assert trained(ranks, name)["rates"] == pytest.approx(alone(name)["rates"], rel=1e-6)


@pytest.mark.parametrize(("ranks", "name"), RUNS)
def test_all_parameters_are_sharded_and_the_work_is_shared(trained, ranks, name):
    run = trained(ranks, name)
    placements = {"hsdp": "(Replicate(), Shard(dim=0))", "ddp": "plain"}.get(name, "(Shard(dim=0),)")
    assert run["placements"] == {placements}
    assert run["is_fsdp2"] is (name != "ddp")
    assert run["shared"]


def test_the_run_in_one_process_moves_all_weights_but_the_frozen_ones(expected):
    before = dict(runs.half_frozen_llama().named_parameters())
    for variant in (None, "frozen"):
        for name, weight in expected[variant]["weights"].items():
            still = variant == "frozen" and not before[name].requires_grad
            assert torch.equal(weight, before[name]) is still, name
    assert min(expected[None]["norms"]) > runs.CLIP


def test_ranks_of_ddp_hold_the_same_weights(two):
    first, second = (rank["ddp"]["uninterrupted"]["weights"] for rank in two)
    assert max_difference(first, second) == 0


@pytest.mark.parametrize(("ranks", "name"), RESUMED)
def test_a_checkpoint_brings_back_everything_exactly(two, four, ranks, name):
    facts = (two[0] if ranks == 2 else four)[name]
    saved, loaded = facts["saved"], facts["loaded"]
    assert max_difference(facts["fresh"]["weights"], saved["weights"]) > 0.1
    assert max_difference(loaded["weights"], saved["weights"]) == 0
    assert max_difference(loaded["state"], saved["state"]) == 0
    assert loaded["groups"] == saved["groups"]
    assert loaded["schedule"] == saved["schedule"] > 0


@pytest.mark.parametrize(("ranks", "name"), RESUMED)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(two, four, ranks, name):
    facts = (two[0] if ranks == 2 else four)[name]
    assert max_difference(facts["resumed"]["weights"], facts["uninterrupted"]["weights"]) == 0
    assert max_difference(facts["resumed"]["state"], facts["uninterrupted"]["state"]) == 0


@pytest.mark.parametrize("kind", ["sharded", "full"])
def test_a_checkpoint_of_four_processes_loads_in_two_and_the_run_goes_on(two, four, kind):
    saved, found = four[kind]["saved"], two[0][f"{kind}, from four"]
    assert max_difference(found["loaded"]["weights"], saved["weights"]) == 0
    assert max_difference(found["loaded"]["state"], saved["state"]) == 0
    assert max_difference(found["resumed"]["weights"], four[kind]["uninterrupted"]["weights"]) < 1e-6


def test_bf16_is_that_of_torch_and_keeps_weights_and_state_in_float32(two, expected):
    found = two[0]["bf16"]
    assert max_difference(found["weights"], two[0]["bf16 by hand"]) == 0
    assert {tensor.dtype for tensor in [*found["weights"].values(), *found["state"].values()]} == {torch.float32}
    assert 1e-3 < max_difference(found["weights"], expected[None]["weights"]) < 0.15


def test_a_head_that_no_checkpoint_had_is_trained_on_every_rank(two):
    head = {f"{layer}.{kind}" for layer in ("bert.pooler.dense", "classifier") for kind in ("weight", "bias")}
    assert [rank["new head"]["meta"] for rank in two] == [set(), head]
    assert all(head <= rank["new head"]["moved"] for rank in two)


def test_accelerate_refuses_to_prepare_one_without_the_other_under_fsdp2(two):
    for missing in ("model", "optimizer"):
        assert "model and optimizer must be passed together" in two[0]["orders"][f"fsdp2, {missing}"]


def test_an_optimizer_left_out_of_prepare_raises_at_its_first_step(two):
    for rank in two:
        assert "no longer in the model" in rank["orders"]["fsdp2, another"]
        assert "prepare_normuon(accelerator, model)" in rank["orders"]["fsdp2, another"]


def test_prepare_in_one_call_trains_under_fsdp2_and_in_two_under_ddp(two, expected):
    for order in ("fsdp2, together", "ddp, apart"):
        assert two[0]["orders"][order] == expected[None]["weights"].keys()


@pytest.mark.parametrize("name", ["fsdp2", "fsdp2, itself", "ddp", "ddp, itself"])
def test_a_prepared_model_is_refused_and_so_is_the_model_inside_it(two, name):
    assert "call prepare_normuon(accelerator, model, loader, lr=...)" in two[0]["refusals"][name]


def test_a_model_in_ddp_is_refused(two):
    assert "give model.module" in two[0]["refusals"]["wrapped"]


def test_fsdp_that_falls_back_to_ddp_says_so(two):
    (warning,) = two[0]["fallback"]["warning"]
    assert "distributed_type is MULTI_CPU" in warning
    assert two[0]["fallback"]["model"] == "DistributedDataParallel"


def test_metrics_of_all_ranks_are_those_of_one_process(two):
    model = float64_llama()
    optimizer = build_normuon(model, **OPTIONS)
    model(**next(iter(DataLoader(examples(), 2)))).loss.backward()
    optimizer.step()
    assert (
        two[0]["metrics"] == two[1]["metrics"] == pytest.approx(optimizer.metrics(synchronize=True), rel=1e-5, abs=1e-6)
    )


def test_metrics_reach_the_tracker(two, folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    written = EventAccumulator(str(folder / "logs" / "run")).Reload()
    for name, value in two[0]["metrics"].items():
        assert [event.value for event in written.Scalars(name)] == pytest.approx([value])
