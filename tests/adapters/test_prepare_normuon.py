"""prepare_normuon: what it returns, resume through Accelerate's own checkpoints, refusals."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from torch.utils.data import DataLoader

from normuon_plugins import NorMuon
from normuon_plugins.accelerate import prepare_normuon
from tests.adapters.training import GLOBAL_BATCH, OPTIONS, examples, weights
from tests.models import max_difference, tiny_llama


def prepared(accelerator, seed=0):
    return prepare_normuon(accelerator, tiny_llama(seed), DataLoader(examples(), GLOBAL_BATCH), **OPTIONS)


def train(accelerator, model, optimizer, batches):
    for batch in batches:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()


def test_returns_what_prepare_would_in_the_same_order():
    accelerator = Accelerator(cpu=True)
    model, optimizer, loader = prepared(accelerator)
    assert isinstance(optimizer, AcceleratedOptimizer)
    assert isinstance(optimizer.optimizer, NorMuon)
    in_model = {id(parameter) for parameter in model.parameters()}
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == in_model
    assert accelerator.prepare(model, loader) == (model, loader)  # already prepared


def test_resume_equals_the_uninterrupted_run(tmp_path):
    accelerator = Accelerator(cpu=True)
    model, optimizer, loader = prepared(accelerator)
    batches = list(loader)
    train(accelerator, model, optimizer, batches[:3])
    accelerator.save_state(str(tmp_path))
    train(accelerator, model, optimizer, batches[3:])

    again = Accelerator(cpu=True)
    resumed, resumed_optimizer, _ = prepared(again, seed=7)
    again.load_state(str(tmp_path))
    train(again, resumed, resumed_optimizer, batches[3:])
    assert max_difference(weights(resumed), weights(model)) == 0


def test_accumulation_steps_once_for_several_batches():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer, loader = prepared(accelerator)
    moved = []
    for batch in list(loader)[:4]:
        before = weights(model)
        train(accelerator, model, optimizer, [batch])
        moved.append(not torch.equal(before["lm_head.weight"], weights(model)["lm_head.weight"]))
    assert moved == [False, True, False, True]


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM])
def test_sharding_is_refused_before_anything_is_built(kind):
    with pytest.raises(ValueError, match=f"under DDP or FSDP2.* {kind.value}.*fsdp_version=2"):
        prepare_normuon(SimpleNamespace(distributed_type=kind, is_fsdp2=False), tiny_llama())


@pytest.mark.parametrize("misplaced", [3e-5, torch.optim.SGD([torch.ones(1)])])
def test_what_is_no_loader_is_refused(misplaced):
    with pytest.raises(TypeError, match=r"takes data loaders after the model, not a (float|SGD)"):
        prepare_normuon(Accelerator(cpu=True), tiny_llama(), misplaced)


def test_a_prepared_model_is_refused():
    accelerator = Accelerator(cpu=True)
    model, _, _ = prepared(accelerator)
    with pytest.raises(ValueError, match="already prepared"):
        prepare_normuon(accelerator, model, lr=0.1)


def test_an_unknown_option_is_refused():
    with pytest.raises(TypeError, match=r"unknown options \['learning_rate'\]"):
        prepare_normuon(Accelerator(cpu=True), tiny_llama(), learning_rate=0.1)
