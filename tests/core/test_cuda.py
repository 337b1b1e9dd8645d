"""What only a GPU can show; machines without one skip this file and say so."""

import copy

import pytest
import torch
from torch import nn

from normuon_plugins import NorMuon, build_normuon

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

OPTIONS = [{}, {"nesterov": True, "momentum_dtype": "int8"}, {"lr": "tensor", "kahan_sum": True}, {"compile": True}]


def make_model(dtype=torch.float32):
    model = nn.Sequential(nn.Linear(160, 256), nn.Linear(256, 160), nn.LayerNorm(160), nn.Conv2d(4, 8, 3))
    return model.to("cuda", dtype)


def give_gradients(model, seed):
    generator = torch.Generator("cuda").manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator, device="cuda").to(parameter.dtype)


def make_optimizer(model, options):
    lr = torch.tensor(1e-2, device="cuda") if options.get("lr") == "tensor" else 1e-2
    return build_normuon(model, **{**options, "lr": lr})


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_step_never_waits_for_the_device(options):
    model = make_model(torch.bfloat16)
    optimizer = make_optimizer(model, options)
    give_gradients(model, 0)
    optimizer.step()  # plans, creates state and compiles
    give_gradients(model, 1)
    before = [parameter.clone() for parameter in model.parameters()]
    try:
        torch.cuda.set_sync_debug_mode("error")
        optimizer.step()
        optimizer.metrics()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_float32_products_give_the_weights_of_the_cpu():
    model = make_model()
    on_cpu = copy.deepcopy(model).cpu()
    for seed in range(4):
        give_gradients(model, seed)
        for parameter, twin in zip(model.parameters(), on_cpu.parameters(), strict=True):
            twin.grad = parameter.grad.cpu()
        if seed == 0:
            optimizers = [build_normuon(m, lr=1e-2, ns_dtype="float32") for m in (model, on_cpu)]
        for optimizer in optimizers:
            optimizer.step()
    for parameter, twin in zip(model.parameters(), on_cpu.parameters(), strict=True):
        torch.testing.assert_close(parameter.cpu(), twin, rtol=1e-4, atol=1e-5)


def test_transient_memory_is_bounded_by_the_bucket():
    weights = [nn.Parameter(torch.randn(256, 256, device="cuda")) for _ in range(64)]
    bucket_bytes = 8 * 256 * 256 * 2
    optimizer = NorMuon(weights, bucket_bytes=bucket_bytes)
    for _ in range(2):
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        optimizer.step()
    assert torch.cuda.max_memory_allocated() - before < 8 * bucket_bytes
