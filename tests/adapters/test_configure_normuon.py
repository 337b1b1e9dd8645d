"""configure_normuon: what it returns, the length and shape of its schedule, resume, names in the log, refusals."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch.utils.data import DataLoader
from transformers import get_scheduler

from normuon_plugins import NorMuon
from normuon_plugins.lightning import configure_normuon
from normuon_plugins.lightning.schedule import build_schedule
from tests.adapters.training import GLOBAL_BATCH, OPTIONS, STEPS, examples, lightning_module, lightning_trainer
from tests.models import max_difference, tiny_llama


def loader():
    return DataLoader(examples(), GLOBAL_BATCH)


def test_without_a_scheduler_it_returns_the_optimizer():
    module = lightning_module(tiny_llama(), scheduler=None, warmup=0)
    assert isinstance(module.configure_optimizers(), NorMuon)


def test_schedule_spans_the_run_in_optimizer_steps(tmp_path):
    # two epochs of 6 batches, two batches per step: 6 steps, and the rate has fallen to zero after the last
    module = lightning_module(tiny_llama())
    trainer = lightning_trainer(tmp_path, max_steps=-1, max_epochs=2, accumulate_grad_batches=2)
    trainer.fit(module, loader())
    assert trainer.global_step == 6
    config = trainer.lr_scheduler_configs[0]
    assert (config.interval, config.frequency) == ("step", 1)
    assert config.scheduler.last_epoch == 6
    assert config.scheduler.get_last_lr() == pytest.approx([0.0, 0.0, 0.0])


@pytest.mark.parametrize("shape", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 3, 0.25])
def test_shapes_are_those_of_transformers(shape, warmup):
    rates = []
    for theirs in (False, True):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.5)
        if theirs:
            name = "constant_with_warmup" if shape == "constant" else shape
            steps = 3 if warmup == 0.25 else warmup  # a quarter of 11, rounded up
            schedule = get_scheduler(name, optimizer, num_warmup_steps=steps, num_training_steps=11)
        else:
            schedule = build_schedule(optimizer, shape, warmup=warmup, total_steps=11)
        rates.append([])
        for _ in range(12):
            rates[-1].append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
    assert rates[0] == pytest.approx(rates[1])


def test_resume_equals_the_uninterrupted_run(tmp_path):
    def run(model, steps, **changes):
        # All batches alike: Lightning 2.6 begins the loader anew one step late after a resume, with AdamW as well.
        # Epochs of three steps, so that the checkpoint lies between two; a schedule that does not know the length.
        data = DataLoader(examples()[:GLOBAL_BATCH] * (STEPS // 2), GLOBAL_BATCH)
        trainer = lightning_trainer(tmp_path, max_steps=steps)
        trainer.fit(lightning_module(model, scheduler="constant"), data, **changes)
        assert trainer.global_step == steps
        return trainer

    whole, half, resumed = tiny_llama(), tiny_llama(), tiny_llama(seed=7)
    run(whole, STEPS)
    run(half, STEPS // 2).save_checkpoint(tmp_path / "half.ckpt")
    run(resumed, STEPS, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert max_difference(resumed, whole) == 0


def test_learning_rate_monitor_logs_both_rates_by_group_name(tmp_path):
    trainer = lightning_trainer(
        tmp_path,
        logger=CSVLogger(tmp_path),
        callbacks=[LearningRateMonitor("step")],
        log_every_n_steps=1,
    )
    trainer.fit(lightning_module(tiny_llama()), loader())
    columns = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"lr-NorMuon/normuon_o_i", "lr-NorMuon/adamw", "lr-NorMuon/adamw_no_decay"} <= set(columns)


def test_warmup_without_a_scheduler_is_refused():
    with pytest.raises(ValueError, match="warmup=10 needs a scheduler"):
        configure_normuon(lightning_module(tiny_llama()), warmup=10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheduler": "cosin"}, "scheduler='cosin' is not known; use one of"),
        ({"warmup": 100}, "warmup=100 is not within the run's 6 steps"),
        ({"warmup": -1}, "warmup=-1 is not within"),
        ({"warmup": "5%"}, "warmup='5%' must be a number of steps, or a fraction"),
    ],
)
def test_schedules_that_cannot_be_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        lightning_trainer(tmp_path).fit(lightning_module(tiny_llama(), **options), loader())


def test_a_run_without_end_needs_a_length(tmp_path):
    with pytest.raises(ValueError, match="the trainer estimates inf steps; set max_steps"):
        lightning_trainer(tmp_path, max_steps=-1).fit(lightning_module(tiny_llama()), loader())


def test_an_unknown_option_is_refused():
    with pytest.raises(TypeError, match=r"unknown options \['schedule'\]; known are .*'scheduler', .*'warmup'"):
        configure_normuon(lightning_module(tiny_llama()), **OPTIONS, schedule="cosine")


def test_a_part_of_the_module_is_refused():
    with pytest.raises(TypeError, match=r"takes the LightningModule itself \(self\), not LlamaForCausalLM"):
        configure_normuon(tiny_llama(), **OPTIONS)


@pytest.mark.parametrize("kind", [FSDPStrategy, DeepSpeedStrategy])
def test_strategies_that_hide_the_matrices_are_refused(kind):
    # Lightning wants a GPU for the one and the package deepspeed for the other; the strategy is all that is asked
    module = lightning_module(tiny_llama(), scheduler=None, warmup=0)
    module._trainer = SimpleNamespace(strategy=kind.__new__(kind))
    message = rf"{kind.__name__} leaves flat shards of them\. Use ModelParallelStrategy with fully_shard \(FSDP2\)"
    with pytest.raises(ValueError, match=message):
        module.configure_optimizers()
