"""The Trainer on two and four processes: DDP, FSDP2 by Accelerate, and what transformers shards while loading.

Each run is compared with one process on the same global batch, in float64, where the order of sums does not show; and
with itself, resumed by a process whose model began with other weights.
"""

import pytest
import torch

from normuon_plugins.hf_trainer import NorMuonMetrics, unregister_normuon
from tests.adapters import trainer_runs as runs
from tests.adapters.training import STEPS, examples, float64_llama, trainer_arguments, weights
from tests.models import max_difference, tiny_llama
from tests.ranks import run_ranks

SHARDED, FULL = {"state_dict_type": "SHARDED_STATE_DICT"}, {"state_dict_type": "FULL_STATE_DICT"}
# name -> model by seed, fsdp_config, arguments
BY_ACCELERATE = {
    "sharded": (runs.float64(tiny_llama), {**SHARDED, "activation_checkpointing": True}, {}),
    "full": (runs.float64(tiny_llama), {**FULL, "cpu_ram_efficient_loading": True}, {}),
    "conv1d": (runs.float64(runs.gpt2), FULL, {}),
    "tied": (runs.float64(runs.tied_llama), SHARDED, {}),
    "experts": (runs.float64(runs.mixtral), SHARDED, {}),
    # optim_args of trainer_arguments ask for float64 products
    "bf16": (tiny_llama, SHARDED, {"bf16": True, "optim_args": "adamw_lr=0.003"}),
}
# name -> saved model, DistributedConfig, arguments
BY_TRANSFORMERS = {
    "own fsdp2": ("llama", {"fsdp_size": 2}, {"gradient_accumulation_steps": 2}),
    "own tensor parallel": ("llama", {"tp_size": 2, "tp_plan": "auto"}, {"per_device_train_batch_size": 4}),
    "own experts": ("qwen3_moe", {"fsdp_size": 2, "ep_size": 2}, runs.UNCLIPPED),
}
BY_TRANSFORMERS_OF_FOUR = {
    "own hsdp": ("llama", {"fsdp_size": 2, "dp_replicate_size": 2}, {}),
    "own experts and fsdp2": ("mixtral", {"fsdp_size": 4, "ep_size": 2}, {}),
}
HSDP = "hsdp"


def two_processes(folder):
    rank = torch.distributed.get_rank()
    facts = {"alone": runs.train_alone(folder / f"alone-{rank}", rank)}
    facts["ddp"], facts["ddp, resumed"] = resumed(
        runs.train, folder / "ddp", runs.float64(tiny_llama), callbacks=[NorMuonMetrics]
    )
    for name, (model, config, changes) in BY_ACCELERATE.items():
        facts[name], facts[f"{name}, resumed"] = resumed(
            runs.train_fsdp2, folder / name, model, config=config, **changes
        )
    facts["accumulating"] = runs.train_fsdp2(
        folder / "accumulating", float64_llama(), callbacks=[NorMuonMetrics], gradient_accumulation_steps=2
    )
    facts |= {f"fsdp1, {flag}": refusal_of_fsdp1(folder / "fsdp1", use_orig_params=flag) for flag in (True, False)}
    for name, (source, distributed, changes) in BY_TRANSFORMERS.items():
        facts[name] = runs.train_distributed(folder / name, folder / source, distributed, **changes)
    return {**facts, **saving_of_what_transformers_sharded(folder)}


def four_processes(folder):
    from accelerate import ParallelismConfig

    facts = {}
    for name, (source, distributed, changes) in BY_TRANSFORMERS_OF_FOUR.items():
        facts[name] = runs.train_distributed(folder / name, folder / source, distributed, **changes)
    mesh = ParallelismConfig(dp_replicate_size=2, dp_shard_size=2)
    facts[HSDP] = runs.train_fsdp2(folder / HSDP, float64_llama(), parallelism_config=mesh)
    return facts


def resumed(train, folder, model, **changes):
    """Return the uninterrupted run, and one that goes on from the middle of it."""
    whole = train(folder, model(0), save_strategy="steps", save_steps=3, **changes)
    return whole, train(folder, model(7), resume=folder / "checkpoint-3", **changes)


def refusal_of_fsdp1(folder, **config):
    """Return what the Trainer says to fsdp_config={"version": 1}."""
    from transformers import Trainer

    with runs.pretended_accelerators() as state:
        state.device = torch.device("cpu")  # FSDP1 refuses Accelerate's "cpu:0"
        # sync_module_states asks for an accelerator
        config |= {"version": 1, "sync_module_states": False}
        changes = {"fsdp": True, "fsdp_config": config, "accelerator_config": {"use_configured_state": True}}
        arguments = trainer_arguments(folder, **changes)
        trainer = Trainer(model=tiny_llama(), args=arguments, train_dataset=examples())
        with pytest.raises(ValueError, match="FSDP") as error:
            trainer.train()
    return str(error.value)


def saving_of_what_transformers_sharded(folder):
    from transformers import AutoModelForCausalLM

    run = (folder / "saved", folder / "llama", {"fsdp_size": 2})
    saving = {"save_strategy": "steps", "save_steps": 3}
    with pytest.raises(ValueError, match="DistributedConfig") as error:
        runs.train_distributed(*run, **saving)
    saved = runs.train_distributed(*run, **saving, save_only_model=True)
    loaded = AutoModelForCausalLM.from_pretrained(folder / "saved" / f"checkpoint-{STEPS}", dtype=torch.float64)
    return {"own, saving": str(error.value), "own, saved": saved, "own, loaded": weights(loaded)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where all processes write, with checkpoints in float64 for runs that shard while loading."""
    folder = tmp_path_factory.mktemp("sharded")
    float64_llama().save_pretrained(folder / "llama")
    runs.mixtral().double().save_pretrained(folder / "mixtral")
    runs.qwen3_moe().double().save_pretrained(folder / "qwen3_moe")
    return folder


@pytest.fixture(scope="module")
def ranks(folder):
    return run_ranks(two_processes, 2, folder)


@pytest.fixture(scope="module")
def two(ranks):
    return ranks[0]


@pytest.fixture(scope="module")
def four(folder):
    return run_ranks(four_processes, 4, folder)[0]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The runs that the others must equal, in one process, by model and arguments; each trained once."""
    trained = {}

    def run(model, **changes):
        key = (model, *changes.items())
        if key not in trained:
            folder = tmp_path_factory.mktemp("one")
            trained[key] = runs.train(folder, MODELS[model](), callbacks=[NorMuonMetrics], **changes)
        return trained[key]

    yield run
    unregister_normuon()


MODELS = {
    "llama": float64_llama,
    "mixtral": lambda: runs.mixtral().double(),
    "qwen3_moe": lambda: runs.qwen3_moe().double(),
    "conv1d": lambda: runs.gpt2().double(),
    "tied": lambda: runs.tied_llama().double(),
}
# run -> its model, where that is not its name
MODEL_OF = {"ddp": "llama", "sharded": "llama", "full": "llama", "accumulating": "llama", "experts": "mixtral"}
MODEL_OF |= {name: source for name, (source, *_) in {**BY_TRANSFORMERS, **BY_TRANSFORMERS_OF_FOUR}.items()}
MODEL_OF[HSDP] = "llama"
OF_TWO = ["ddp", *(name for name in BY_ACCELERATE if name != "bf16"), "accumulating", *BY_TRANSFORMERS]
OF_FOUR = [*BY_TRANSFORMERS_OF_FOUR, HSDP]


def check_equals_one_process(run, name, one):
    model = MODEL_OF.get(name, name)
    clipping = runs.UNCLIPPED if name == "own experts" else {}
    assert max_difference(run.weights, one(model, **clipping).weights) < 1e-6
    assert runs.moved(run, MODELS[model]())


@pytest.mark.parametrize("name", OF_TWO)
def test_two_processes_equal_one(two, one, name):
    check_equals_one_process(two[name], name, one)


@pytest.mark.parametrize("name", OF_FOUR)
def test_four_processes_equal_one(four, one, name):
    check_equals_one_process(four[name], name, one)


@pytest.mark.parametrize("name", ["ddp", *BY_ACCELERATE])
def test_resume_equals_the_uninterrupted_run(two, name):
    assert max_difference(two[f"{name}, resumed"].weights, two[name].weights) == 0
    assert runs.moved(two[name], (BY_ACCELERATE.get(name) or [runs.float64(tiny_llama)])[0](0))


def test_processes_that_train_alone_share_nothing_although_there_is_a_group(ranks, tmp_path):
    """Each has data of its own: sharing would give one of them the other's directions."""
    for rank, facts in enumerate(ranks):
        assert max_difference(facts["alone"], runs.train_alone(tmp_path, rank)) < 1e-12
    assert max_difference(ranks[0]["alone"], ranks[1]["alone"]) > 1e-3


@pytest.mark.parametrize("name", ["ddp", *BY_ACCELERATE, *BY_TRANSFORMERS])
def test_ranks_end_with_the_same_weights(ranks, name):
    first, second = ranks
    assert max_difference(first[name].weights, second[name].weights) == 0


@pytest.mark.parametrize("name", [*BY_ACCELERATE, "accumulating"])
def test_accelerate_is_in_fsdp2_mode_and_every_parameter_is_sharded(two, name):
    assert two[name].fsdp2
    assert set(two[name].placements.values()) == {"Shard(dim=0)"}


PLACEMENTS = {
    "own fsdp2": {"fsdp: Shard(dim=0)"},
    "own tensor parallel": {"", "tp: Shard(dim=0)", "tp: Shard(dim=1)"},
    "own experts": {"fsdp: Shard(dim=0)", "efsdp, ep: _StridedShard(dim=0, sf=2), Shard(dim=0)"},
    "own hsdp": {"dp_replicate, fsdp: Replicate(), Shard(dim=0)"},
    "own experts and fsdp2": {"fsdp: Shard(dim=0)", "efsdp, ep: _StridedShard(dim=0, sf=2), Shard(dim=0)"},
    HSDP: {"dp_replicate, dp_shard_cp: Replicate(), Shard(dim=0)"},
}


@pytest.mark.parametrize("name", BY_TRANSFORMERS)
def test_transformers_shards_as_its_configuration_says(two, name):
    assert set(two[name].placements.values()) == PLACEMENTS[name]


@pytest.mark.parametrize("name", OF_FOUR)
def test_four_processes_are_laid_out_on_two_dimensions(four, name):
    assert set(four[name].placements.values()) == PLACEMENTS[name]


@pytest.mark.parametrize("name", ["bf16", *OF_TWO])
def test_two_processes_share_the_work_of_a_step(two, name):
    assert two[name].shared


@pytest.mark.parametrize("name", OF_FOUR)
def test_four_processes_share_the_work_of_a_step(four, name):
    assert four[name].shared


@pytest.mark.parametrize("name", ["ddp", "accumulating"])
def test_every_rank_logs_the_metrics_of_one_process(ranks, one, name):
    expected = [entry for entry in one("llama").log if "normuon/update_rms" in entry]
    assert len(expected) == STEPS
    for rank in ranks:
        found = [entry for entry in rank[name].log if "normuon/update_rms" in entry]
        assert found == [pytest.approx(entry, rel=1e-4, abs=1e-6) for entry in expected]


@pytest.mark.parametrize("flag", [True, False])
def test_fsdp1_is_refused_with_the_setting_to_change(two, flag):
    assert two[f"fsdp1, {flag}"].startswith(
        "optim='normuon' needs whole matrices, and FSDP version 1 flattens parameters."
        " Use FSDP2: TrainingArguments(fsdp=True, fsdp_config={'version': 2})"
    )


def test_the_trainer_saves_no_optimizer_state_of_what_transformers_sharded(two):
    """transformers' own refusal, before the first step."""
    assert "Pass `save_only_model=True` or `save_strategy='no'`" in two["own, saving"]


def test_weights_of_what_transformers_sharded_are_saved_whole(two):
    assert max_difference(two["own, loaded"], two["own, saved"].weights) == 0
