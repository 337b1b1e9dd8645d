"""prepare_normuon in one process: what it returns, resume through Accelerate's own checkpoints, refusals."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from torch import nn
from torch.utils.data import DataLoader

from normuon_plugins import NorMuon, build_normuon
from normuon_plugins.accelerate import prepare_normuon
from tests.adapters import accelerate_runs, cpu_start
from tests.adapters.training import GLOBAL_BATCH, OPTIONS, examples, float64_llama, weights
from tests.models import max_difference, tiny_llama


@pytest.fixture(autouse=True)
def _first_accelerator():
    cpu_start.forget()
    yield
    cpu_start.forget()


def compiled(model):
    return torch.compile(model, backend="eager")  # the other backends import for seconds


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


@pytest.mark.parametrize("order", ["model first", "optimizer first"])
def test_building_first_and_preparing_in_two_calls_trains_the_same_in_one_process(order):
    accelerator, model = Accelerator(cpu=True), tiny_llama()
    optimizer = build_normuon(model, **OPTIONS)
    if order == "model first":
        model, optimizer = accelerator.prepare(model), accelerator.prepare(optimizer)
    else:
        optimizer, model = accelerator.prepare(optimizer), accelerator.prepare(model)
    expected, one_call, loader = prepared(accelerator)
    batches = list(loader)[:2]
    train(accelerator, model, optimizer, batches)
    train(accelerator, expected, one_call, batches)
    assert max_difference(weights(model), weights(expected)) == 0
    assert max_difference(weights(model), weights(tiny_llama())) > 1e-3


def test_a_compiled_model_trains_like_the_model_itself():
    accelerator, models = Accelerator(cpu=True), [float64_llama(), float64_llama()]
    loader = DataLoader(examples(), GLOBAL_BATCH)
    for model, wrap in zip(models, (nn.Identity(), compiled), strict=True):
        wrapped, optimizer = prepare_normuon(accelerator, wrap(model), **OPTIONS)
        train(accelerator, wrapped, optimizer, itertools.islice(loader, 2))
    assert max_difference(*models) < 1e-9
    assert max_difference(models[0], float64_llama()) > 1e-3


def test_fsdp1_is_refused_in_a_sentence_that_says_what_to_use():
    accelerator = accelerate_runs.sharding({"fsdp_version": 1})
    with pytest.raises(ValueError, match=r"distributed_type is FSDP, version 1\. Use .*fsdp_version=2"):
        prepare_normuon(accelerator, tiny_llama())


@pytest.mark.parametrize("kind", [DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM])
def test_other_sharding_is_refused_before_anything_is_built(kind):
    with pytest.raises(ValueError, match=f"under DDP or FSDP2.* {kind.value}.*fsdp_version=2"):
        prepare_normuon(SimpleNamespace(distributed_type=kind, is_fsdp2=False), tiny_llama())


def test_fsdp_in_a_process_that_is_alone_says_so():
    accelerator = Accelerator(cpu=True, fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2))
    with pytest.warns(UserWarning, match="FSDP was asked for, but .* distributed_type is NO"):
        prepare_normuon(accelerator, tiny_llama())


def test_a_process_that_is_alone_among_several_says_so(monkeypatch):
    accelerator = Accelerator(cpu=True)  # with the next line before it, it would know the other
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.warns(UserWarning, match=r"2 processes were started.*This process trains alone.*cpu=True"):
        prepare_normuon(accelerator, tiny_llama())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((tiny_llama(), DataLoader([1])), "begins with an Accelerator, not LlamaForCausalLM"),
        ((Accelerator, tiny_llama()), "begins with an Accelerator, not Accelerator itself"),
        ((SimpleNamespace(distributed_type=None), DataLoader([1])), "takes the model, .* got DataLoader"),
    ],
)
def test_arguments_in_another_order_are_refused(arguments, message):
    with pytest.raises(TypeError, match=message):
        prepare_normuon(*arguments)


@pytest.mark.parametrize("misplaced", [3e-5, torch.optim.SGD([torch.ones(1)]), {"lr": 3e-5}, torch.tensor(3e-5)])
def test_what_is_no_loader_is_refused(misplaced):
    with pytest.raises(TypeError, match=r"takes data loaders after the model, not (float|SGD|dict|Tensor)\."):
        prepare_normuon(Accelerator(cpu=True), tiny_llama(), misplaced)


@pytest.mark.parametrize("wrap", [nn.Identity(), compiled, nn.Sequential], ids=["itself", "compiled", "nested"])
def test_a_prepared_model_is_refused_in_whatever_it_is_wrapped(wrap):
    accelerator = Accelerator(cpu=True)
    model, _, _ = prepared(accelerator)
    with pytest.raises(ValueError, match=r"already prepared.* call prepare_normuon"):
        prepare_normuon(accelerator, wrap(model), lr=0.1)


def test_an_unknown_option_is_refused():
    with pytest.raises(TypeError, match=r"unknown options \['learning_rate'\]"):
        prepare_normuon(Accelerator(cpu=True), tiny_llama(), learning_rate=0.1)
