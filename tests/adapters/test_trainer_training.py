"""What users of the Trainer switch on, in one process: each compared with a run without it, or with a plain loop."""

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, get_scheduler
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from normuon_plugins import build_normuon
from normuon_plugins.hf_trainer import NorMuonFactory, register_normuon, unregister_normuon
from tests.adapters import trainer_runs as runs
from tests.adapters import training
from tests.adapters.training import OPTIONS, STEPS, examples, float64_llama, trainer_arguments, weights
from tests.models import max_difference, tiny_llama

RANDOM = {"train_sampling_strategy": "random", "save_strategy": "steps", "save_steps": 3}
# ns_dtype of trainer_arguments is for runs in float64
MIXED = {"optim_args": "adamw_lr=0.003"}


@pytest.fixture(autouse=True)
def _registered():
    register_normuon()
    yield
    unregister_normuon()


RESUMED = {
    "llama": (tiny_llama, {}),
    "conv1d": (runs.gpt2, {}),
    "tied": (runs.tied_llama, {}),
    "bf16": (tiny_llama, {"bf16": True, **MIXED}),
    "bfloat16 weights": (lambda seed: tiny_llama(seed).bfloat16(), MIXED),
}


@pytest.mark.parametrize("name", RESUMED)
def test_resume_equals_the_uninterrupted_run(tmp_path, name):
    model, changes = RESUMED[name]
    whole = runs.train(tmp_path, model(0), **RANDOM, **changes)
    resumed = runs.train(tmp_path, model(7), **RANDOM, **changes, resume=tmp_path / "checkpoint-3")
    assert max_difference(resumed.weights, whole.weights) == 0
    assert runs.moved(whole, model(0))


def test_resume_of_experts_from_their_own_checkpoint_equals_the_uninterrupted_run(tmp_path):
    """A checkpoint holds experts one by one; from_pretrained puts them together, and the Trainer's resume does not."""
    whole = runs.train(tmp_path, runs.mixtral(0), **RANDOM)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-3", experts_implementation="eager")
    resumed = runs.train(tmp_path, model, **RANDOM, resume=tmp_path / "checkpoint-3")
    assert max_difference(resumed.weights, whole.weights) == 0
    assert runs.moved(whole, runs.mixtral(0))


def test_accumulated_batches_equal_one_batch(tmp_path):
    accumulated = runs.train(tmp_path, float64_llama(), gradient_accumulation_steps=2)
    assert max_difference(accumulated.weights, runs.train(tmp_path, float64_llama()).weights) < 1e-6


def test_gradient_checkpointing_changes_nothing(tmp_path):
    checkpointed = runs.train(tmp_path, float64_llama(), activation_checkpointing=True)
    assert max_difference(checkpointed.weights, runs.train(tmp_path, float64_llama()).weights) < 1e-6


def test_bf16_equals_a_plain_loop_under_autocast(tmp_path):
    trained = runs.train(tmp_path, tiny_llama(), bf16=True, **MIXED)
    model = tiny_llama()
    optimizer = build_normuon(model, **{name: OPTIONS[name] for name in ("lr", "adamw_lr", "weight_decay")})
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, training.cosine)
    for batch in DataLoader(examples(), 4):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.MAX_GRADIENT_NORM)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    assert max_difference(trained.weights, weights(model)) < 1e-6


def test_evaluation_changes_nothing_and_the_best_model_is_loaded(tmp_path):
    changes = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    best = runs.train(tmp_path, tiny_llama(), **changes, load_best_model_at_end=True, learning_rate=0.1)
    losses = {entry["step"]: entry["eval_loss"] for entry in best.log if "eval_loss" in entry}
    chosen = min(losses, key=losses.get)
    assert chosen < STEPS  # at this learning rate the last model is not the best
    assert max_difference(best.weights, load_file(tmp_path / f"checkpoint-{chosen}" / "model.safetensors")) == 0
    last = load_file(tmp_path / f"checkpoint-{STEPS}" / "model.safetensors")
    assert max_difference(last, runs.train(tmp_path / "plain", tiny_llama(), learning_rate=0.1).weights) == 0


class SmallMemory(torch.nn.Module):
    """A Llama that runs out of memory at more than three examples."""

    def __init__(self):
        super().__init__()
        self.llama = tiny_llama()

    def forward(self, input_ids, labels):
        if len(input_ids) > 3:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return self.llama(input_ids=input_ids, labels=labels)


def test_a_batch_size_found_after_failures_equals_that_batch_size_from_the_start(tmp_path):
    found = runs.train(tmp_path, SmallMemory(), auto_find_batch_size=True)
    chosen = runs.train(tmp_path, SmallMemory(), per_device_train_batch_size=3)
    assert max_difference(found.weights, chosen.weights) == 0
    assert runs.moved(found, SmallMemory())


SCHEDULES = {
    "linear": {},
    "cosine": {},
    "cosine_with_restarts": {"num_cycles": 2},
    "polynomial": {},
    "constant": {},
    "constant_with_warmup": {},
    "inverse_sqrt": {},
    "cosine_with_min_lr": {"min_lr": 1e-3},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 2},
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_move_both_rates_as_they_move_that_of_adamw_torch(tmp_path, name):
    def rates(**changes):
        changes |= {"lr_scheduler_type": name, "lr_scheduler_kwargs": SCHEDULES[name]}
        trainer = Trainer(model=tiny_llama(), args=trainer_arguments(tmp_path, **changes))
        trainer.create_optimizer_and_scheduler(STEPS)
        for parameter in trainer.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        found = []
        for _ in range(STEPS):
            found.append([group["lr"] for group in trainer.optimizer.param_groups])
            trainer.optimizer.step()
            trainer.lr_scheduler.step()
        return found

    theirs = rates(optim="adamw_torch", optim_args=None)
    ratio = OPTIONS["adamw_lr"] / OPTIONS["lr"]
    for (matrices, *others), (expected, _) in zip(rates(), theirs, strict=True):
        assert matrices == pytest.approx(expected)
        assert others == pytest.approx([expected * ratio] * 2)


# schedule -> its options, where two rates of 1e-2 and 1e-3 end; docs/hf_trainer.md
FLOORS = {
    "cosine_with_min_lr": ({"min_lr": 5e-3}, [5e-3, 5e-4]),
    "cosine_warmup_with_min_lr": ({"min_lr_rate": 0.5}, [5e-3, 5e-4]),
    "warmup_stable_decay": ({"num_decay_steps": 2, "min_lr_ratio": 0.5}, [5e-3, 5e-4]),
    "polynomial": ({"lr_end": 5e-3}, [5e-3, 5e-4]),
    "reduce_lr_on_plateau": ({"patience": 0, "factor": 0.1, "min_lr": 5e-4}, [5e-4, 5e-4]),
}


@pytest.mark.parametrize("name", FLOORS)
def test_a_floor_is_that_of_the_first_rate_as_with_two_groups_of_adamw(name):
    options, expected = FLOORS[name]
    model = tiny_llama()
    ours = build_normuon(model, lr=1e-2, adamw_lr=1e-3)
    groups = [{"params": [model.lm_head.weight]}, {"params": [model.model.norm.weight], "lr": 1e-3}]
    theirs = torch.optim.AdamW(groups, lr=1e-2)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in (ours, theirs):
        schedule = get_scheduler(name, optimizer, 0, 8, scheduler_specific_kwargs=options)
        rates = []
        for _ in range(8):
            optimizer.step()
            schedule.step(*([1.0] if name == "reduce_lr_on_plateau" else []))
            rates.append([group["lr"] for group in optimizer.param_groups[:2]])
        assert [min(found) for found in zip(*rates, strict=True)] == pytest.approx(expected)


def test_reduce_on_plateau_lowers_both_rates(tmp_path):
    changes = {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": 0, "factor": 0.5}}
    run = runs.train(tmp_path, tiny_llama(), **changes, eval_strategy="steps", eval_steps=1, learning_rate=0.1)
    entries = [entry for entry in run.log if "learning_rate" in entry]
    assert entries[-1]["learning_rate"] < 0.1
    for entry in entries:
        assert entry["adamw_learning_rate"] == pytest.approx(entry["learning_rate"] * 0.03)


def test_a_run_stopped_by_a_callback_and_trained_again_goes_on(tmp_path):
    """The Trainer keeps its optimizer between two calls of train()."""

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **references):
            control.should_training_stop = state.global_step == 2

    trainer = Trainer(model=tiny_llama(), args=trainer_arguments(tmp_path), train_dataset=examples())
    trainer.add_callback(Stop)
    trainer.train()
    optimizer = trainer.optimizer
    trainer.remove_callback(Stop)
    trainer.train()
    assert trainer.optimizer is optimizer
    assert {int(optimizer.state[p]["step"]) for p in trainer.model.parameters() if "step" in optimizer.state[p]} == {8}


@pytest.mark.parametrize("how", ["optim", "factory"])
def test_deepspeed_is_refused_when_the_optimizer_is_created(tmp_path, how):
    class Config:
        """What transformers keeps of a DeepSpeed configuration, which needs deepspeed to be built."""

        config = {"zero_optimization": {"stage": 2}}  # noqa: RUF012  (read by nobody but the test)

        def is_zero3(self):
            return False

    changes = {} if how == "optim" else {"optim": "adamw_torch", "optim_args": None}
    extra = {} if how == "optim" else {"optimizer_cls_and_kwargs": (NorMuonFactory, {"lr": 1e-3})}
    trainer = Trainer(model=tiny_llama(), args=trainer_arguments(tmp_path, **changes), **extra)
    config = Config()  # transformers keeps a weak reference
    set_hf_deepspeed_config(config)
    try:
        with pytest.raises(ValueError, match=r"DeepSpeed flattens parameters and gradients\. Use FSDP2: Training"):
            trainer.create_optimizer()
    finally:
        unset_hf_deepspeed_config()
