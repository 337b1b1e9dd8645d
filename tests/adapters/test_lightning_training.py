"""What Lightning does around a step in one process: precision, accumulation, clipping, averaged weights."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from torch.utils.data import DataLoader

from normuon_plugins import build_normuon
from tests.adapters.training import (
    GLOBAL_BATCH,
    MAX_GRADIENT_NORM,
    OPTIONS,
    STEPS,
    examples,
    float64_llama,
    lightning_module,
    lightning_trainer,
    run_plain_loop,
    weights,
)
from tests.models import max_difference, tiny_llama

FLOAT32_OPTIONS = {**OPTIONS, "ns_dtype": "float32"}
FIXED_RATE = {"scheduler": None, "warmup": 0, "ns_dtype": "float32"}


def batches(size=GLOBAL_BATCH):
    return DataLoader(examples(), size)


def plain_loop(model, *, dtype=None, scaler=None, clip=None, accumulate=1):
    """No framework: the same steps by hand; returns the weights."""
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    optimizer = build_normuon(model, **FLOAT32_OPTIONS)
    for number, batch in enumerate(batches(GLOBAL_BATCH // accumulate), start=1):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None, cache_enabled=False):
            loss = model(**batch).loss
        scaler.scale(loss / accumulate).backward()
        if number % accumulate == 0:
            scaler.unscale_(optimizer)
            # in the optimizer's order, as Lightning: in bfloat16, another sum of squares becomes another run
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            (clip or torch.nn.utils.clip_grad_norm_)(parameters, MAX_GRADIENT_NORM)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    return weights(model)


def test_accumulated_batches_equal_whole_ones(tmp_path):
    module = lightning_module(float64_llama())
    lightning_trainer(tmp_path, accumulate_grad_batches=2).fit(module, batches(GLOBAL_BATCH // 2))
    assert max_difference(module.model, run_plain_loop()) < 1e-6


def test_clipping_by_value_equals_a_plain_loop(tmp_path):
    module = lightning_module(tiny_llama(), **FIXED_RATE)
    trainer = lightning_trainer(tmp_path, gradient_clip_val=1e-3, gradient_clip_algorithm="value")
    trainer.fit(module, batches())
    clip = lambda parameters, _: torch.nn.utils.clip_grad_value_(parameters, 1e-3)  # noqa: E731
    assert max_difference(module.model, plain_loop(tiny_llama(), clip=clip)) == 0


def test_bf16_mixed_with_accumulation_and_clipping_equals_a_plain_loop(tmp_path):
    module = lightning_module(tiny_llama(), **FIXED_RATE)
    trainer = lightning_trainer(tmp_path, precision="bf16-mixed", accumulate_grad_batches=2)
    trainer.fit(module, batches(GLOBAL_BATCH // 2))
    expected = plain_loop(tiny_llama(), dtype=torch.bfloat16, accumulate=2)
    assert max_difference(module.model, expected) == 0


def test_bf16_true_keeps_the_second_moments_of_the_neurons_in_float32(tmp_path):
    module = lightning_module(tiny_llama(), **FIXED_RATE)
    trainer = lightning_trainer(tmp_path, precision="bf16-true")
    trainer.fit(module, batches())
    state = trainer.optimizers[0].state[module.model.model.layers[0].mlp.up_proj.weight]
    assert {name: value.dtype for name, value in state.items()} == {
        "momentum_buffer": torch.bfloat16,
        "second_momentum_buffer": torch.float32,
        "gradient_mean_square": torch.float32,
    }
    assert max_difference(module.model, plain_loop(tiny_llama().bfloat16())) == 0


def test_16_mixed_skips_the_steps_that_overflow_as_a_plain_loop_does(tmp_path):
    # precision="16-mixed" becomes bf16-mixed on a CPU; the plugin by hand is the same code with a CPU's scaler
    def scaler():
        return torch.amp.GradScaler("cpu", init_scale=2.0**20)

    plugin = MixedPrecision("16-mixed", "cpu", scaler())
    module = lightning_module(tiny_llama(), **FIXED_RATE)
    lightning_trainer(tmp_path, plugins=[plugin]).fit(module, batches())
    assert 2.0**20 > plugin.scaler.get_scale() > 2.0 ** (20 - STEPS)  # some steps were skipped, not all
    assert max_difference(module.model, plain_loop(tiny_llama(), dtype=torch.float16, scaler=scaler())) == 0


class Recorder(Callback):
    """The weights after every step, and those at the start of every epoch."""

    def __init__(self):
        self.steps, self.epochs = [], []

    def on_train_epoch_start(self, trainer, module):
        self.epochs.append(weights(module.model))

    def on_train_batch_end(self, trainer, module, *_):
        self.steps.append(weights(module.model))


class SaveAfter(Callback):
    """A checkpoint after one step of the run; after the run, the average has taken the place of the weights."""

    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def test_ema_leaves_the_average_of_the_weights_after_every_step(tmp_path):
    recorder, module = Recorder(), lightning_module(float64_llama())
    lightning_trainer(tmp_path, callbacks=[recorder, EMAWeightAveraging(decay=0.5)]).fit(module, batches())
    average = recorder.steps[0]
    for step in recorder.steps[1:]:
        average = {name: 0.5 * average[name] + 0.5 * step[name] for name in average}
    assert max_difference(module.model, average) < 1e-6


def test_ema_resumes_as_if_nothing_had_happened(tmp_path):
    """The checkpoint holds the average in place of the weights; the optimizer goes on with the weights."""

    path = tmp_path / "half.ckpt"

    def run(model, *more, **changes):
        recorder = Recorder()
        trainer = lightning_trainer(tmp_path, callbacks=[recorder, EMAWeightAveraging(decay=0.5), *more])
        module = lightning_module(model, **FIXED_RATE)
        # all batches alike and epochs of three steps, see test_configure_normuon
        trainer.fit(module, DataLoader(examples()[:GLOBAL_BATCH] * (STEPS // 2), GLOBAL_BATCH), **changes)
        return recorder.steps[-1], weights(module.model)

    whole = run(tiny_llama(), SaveAfter(STEPS // 2, path))
    resumed = run(tiny_llama(seed=7), ckpt_path=path, weights_only=True)
    assert max_difference(resumed[0], whole[0]) == 0
    assert max_difference(resumed[1], whole[1]) == 0


@pytest.fixture(scope="module")
def averaged_run(tmp_path_factory):
    """Four epochs of two steps; averaged from the second on (swa_epoch_start counts from 1)."""
    recorder, module = Recorder(), lightning_module(float64_llama(), scheduler="constant", warmup=0)
    averaging = StochasticWeightAveraging([0.02, 0.004, 0.005], swa_epoch_start=2, annealing_epochs=1)
    folder, epochs = tmp_path_factory.mktemp("swa"), {"max_steps": -1, "max_epochs": 4, "limit_train_batches": 2}
    trainer = lightning_trainer(folder, callbacks=[recorder, averaging], **epochs)
    with pytest.warns(UserWarning, match="SWA is currently only supported every epoch"):
        trainer.fit(module, batches())
    return recorder, module, trainer.optimizers[0]


def test_swa_leaves_the_average_of_the_epochs(averaged_run):
    recorder, module, _ = averaged_run
    averaged = recorder.epochs[1:]
    expected = {name: sum(epoch[name] for epoch in averaged) / len(averaged) for name in averaged[0]}
    assert max_difference(module.model, expected) < 1e-6


def test_swa_takes_a_rate_for_every_group_in_their_order(averaged_run):
    *_, optimizer = averaged_run
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates == pytest.approx({"normuon_o_i": 0.02, "adamw": 0.004, "adamw_no_decay": 0.005})
