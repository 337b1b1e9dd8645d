"""What is set around an optimizer changes nothing in it: default dtype and device, autocast, where a rate lies."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.optim import adam
from torch.utils._python_dispatch import TorchDispatchMode

from normuon_plugins import NorMuon, build_normuon, clip_grad_norm_
from normuon_plugins.core import adamw_step
from normuon_plugins.core.step_size import as_scalar
from normuon_plugins.diagnostics import diagnose
from tests.ranks import run_ranks


@pytest.fixture
def ambient():
    """Set a default dtype or device, and put both back."""
    dtype, device = torch.get_default_dtype(), torch.get_default_device()

    def choose(value):
        torch.set_default_dtype(value) if isinstance(value, torch.dtype) else torch.set_default_device(value)

    yield choose
    torch.set_default_dtype(dtype)
    torch.set_default_device(None if device.type == "cpu" else device)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 8), nn.LayerNorm(8))


def train(net, **options):
    """Return the weights after three steps, and the numbers of the last one over all ranks."""
    optimizer = build_normuon(net, lr=1e-2, **options)
    for step in range(3):
        optimizer.zero_grad()
        net((torch.arange(6, device="cpu") + step) % 16)[:, :4].square().mean().backward()
        clip_grad_norm_(net.parameters(), 0.01)
        optimizer.step()
    weights = [p.full_tensor() if isinstance(p, DTensor) else p for p in net.parameters()]
    return [weight.detach() for weight in weights], optimizer.metrics(synchronize=True)


def two_ranks_under_float64():
    expected = train(network())
    shared, sharded = network(), network()
    fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
    torch.set_default_dtype(torch.float64)
    return expected, train(shared, process_group=dist.group.WORLD, nonfinite="skip"), train(sharded, nonfinite="skip")


def test_the_default_dtype_changes_no_weight_and_no_number_on_two_ranks():
    """One of them owns no matrix, and sent its zeros in the default dtype."""
    for (weights, numbers), *others in run_ranks(two_ranks_under_float64, 2):
        for found, found_numbers in others:
            torch.testing.assert_close(found, weights)
            assert found_numbers == pytest.approx(numbers, rel=1e-4)


@pytest.mark.parametrize("value", [torch.float64, torch.bfloat16, "meta"])
@pytest.mark.parametrize(
    "options",
    [
        {"nonfinite": "skip"},
        {"nonfinite": "raise", "momentum_dtype": "int8", "nesterov": True},
        {"adjust_lr_fn": "match_rms_adamw", "kahan_sum": True},
    ],
)
def test_neither_default_changes_a_step(ambient, value, options):
    weights, bias = [nn.Parameter(torch.ones(6, 8)) for _ in range(2)], nn.Parameter(torch.ones(3))
    gradient = torch.arange(48.0).view(6, 8).sin()

    def take_steps():
        parameters = copy.deepcopy([*weights, bias])
        groups = [{"params": [(str(lr), each)], "lr": lr} for each, lr in zip(parameters[:2], (0.1, 0.2), strict=True)]
        optimizer = NorMuon([*groups, {"params": [("bias", parameters[2])], "algorithm": "adamw"}], **options)
        for _ in range(2):
            for parameter in parameters:
                parameter.grad = gradient.flatten()[: parameter.numel()].view_as(parameter).clone()
            optimizer.step()
        report = diagnose(optimizer)
        assert len(report.matrices) == 2
        state = [optimizer.state[parameter] for parameter in parameters]
        return [*(each.detach() for each in parameters), *(v for each in state for v in each.values())], {
            name: float(number) for name, number in optimizer.metrics().items()
        }

    expected, numbers = take_steps()
    ambient(value)
    found, found_numbers = take_steps()
    for tensor, other in zip(found, expected, strict=True):
        assert torch.equal(tensor, other)
        assert tensor.dtype == other.dtype
    assert found_numbers == numbers


@pytest.mark.parametrize("options", [{}, {"adjust_lr_fn": "match_rms_adamw"}])
def test_a_custom_orthogonalization_sees_no_autocast(options):
    def cubic(matrices):
        x = matrices / matrices.norm(dim=(-2, -1), keepdim=True)
        for _ in range(5):
            x = 1.5 * x - 0.5 * x @ x.mT @ x
        return x

    weights = [nn.Parameter(torch.zeros(4, 6)) for _ in range(2)]
    for weight, enabled in zip(weights, (False, True), strict=True):
        weight.grad = torch.arange(24.0).view(4, 6).sin()
        optimizer = NorMuon([weight], orthogonalize_fn=cubic, ns_dtype="float32", **options)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            optimizer.step()
    assert torch.equal(*weights)


@pytest.mark.parametrize("algorithm", ["normuon", "adamw"])
@pytest.mark.parametrize("strided", [False, True])
def test_a_rate_of_one_entry_is_a_rate(algorithm, strided):
    """torch.optim.AdamW takes it, also for a weight of no dimension."""
    start = [torch.ones(6, 4).T if strided else torch.ones(4, 6), *[torch.ones(())][: algorithm == "adamw"]]
    moved = []
    for lr in (0.1, torch.tensor([0.1])):
        weights = [nn.Parameter(each.clone(memory_format=torch.preserve_format)) for each in start]
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        optimizer = NorMuon([{"params": weights, "algorithm": algorithm, "lr": lr}])
        optimizer.step()
        assert optimizer.metrics(synchronize=True)[f"{algorithm}/lr"] == pytest.approx(0.1)
        moved.append([weight.detach() for weight in weights])
    torch.testing.assert_close(*moved)


class Devices(TorchDispatchMode):
    """Remember what torch is asked for, and whether copies to another device are waited for."""

    def __init__(self):
        super().__init__()
        self.names, self.blocking = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        self.names.append(name)
        if name == "_to_copy":
            self.blocking.append(not (kwargs or {}).get("non_blocking", False))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1), torch.tensor([0.1])])
def test_an_accelerator_is_not_stopped_where_the_fused_kernel_does_not_fit(monkeypatch, lr):
    """What it is emulated by has no value that could be read back."""
    monkeypatch.setattr(adamw_step, "FUSED_DEVICES", ())
    monkeypatch.setattr(adamw_step, "CAPTURABLE_DEVICES", ("meta",))
    monkeypatch.setattr(adam, "_get_capturable_supported_devices", lambda **_: ["meta"])
    matrix, table = (nn.Parameter(torch.ones(6, 4, device="meta")) for _ in range(2))
    for parameter in (matrix, table):
        parameter.grad = torch.ones_like(parameter)
    groups = [{"params": [matrix], "lr": lr}, {"params": [table], "algorithm": "adamw", "lr": lr}]
    optimizer = NorMuon(groups, orthogonalize_fn=torch.clone, ns_dtype="float32")
    with Devices() as seen:
        optimizer.step()
    assert "_local_scalar_dense" not in seen.names
    assert optimizer.state[table]["step"].device.type == "meta"


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_rate_on_another_device_is_waited_for_on_its_way_to_the_cpu(shape):
    """Sent without waiting it would be read before it has arrived; to an accelerator nobody waits."""
    rate = torch.ones(shape, device="meta")
    with Devices() as seen, pytest.raises(NotImplementedError, match="meta"):
        as_scalar(rate, torch.device("cpu"))
    assert seen.blocking == [True]
    assert as_scalar(torch.ones(shape), torch.device("meta")).device.type == "cpu"
    assert as_scalar(rate, torch.device("meta")).shape == ()


def offloaded():
    """Return the devices of all state of weights on the CPU, on a mesh of devices of another kind."""
    mesh = DeviceMesh("meta", [0])
    found = set()
    for options in ({}, {"momentum_dtype": "int8"}):
        there = DTensor.from_local(torch.empty(4, 8, device="meta"), mesh, [Shard(0)], run_check=False)
        weight = nn.Parameter(torch.ones_like(there, device="cpu"))
        optimizer = NorMuon([weight], **options)
        with pytest.warns(UserWarning, match="gradient"):
            optimizer.step()
        state = optimizer.state[weight]
        assert all(value.placements == weight.placements for value in state.values() if value.shape == weight.shape)
        found |= {value.to_local().device.type for value in state.values()}
    return found


def test_state_of_offloaded_weights_lies_where_they_do():
    """It lay on the mesh's device, where int8 momentum could not be advanced by a gradient on the CPU."""
    assert run_ranks(offloaded, 1) == [{"cpu"}]


def test_looking_for_nan_copies_no_gradient_and_knows_all_kinds_of_them():
    """isfinite made a copy and two masks, more than half as much again as the gradient."""
    large = nn.Parameter(torch.zeros(1 << 18))
    others = [torch.zeros(0), torch.zeros((), dtype=torch.bfloat16), torch.zeros(4, 6).T, torch.full((2,), 3e38)]
    others = [nn.Parameter(each) for each in others]
    optimizer = NorMuon([{"params": [large, *others], "algorithm": "adamw"}], nonfinite="skip", lr=0.1)
    for bad in (None, 1, 2):
        for each in (large, *others):
            each.grad = torch.full_like(each, 3e38)
        if bad is not None:
            others[bad].grad[(-1,) * others[bad].ndim] = (torch.nan, -torch.inf)[bad - 1]
        skipped = optimizer.skipped_steps
        optimizer.step()
        assert optimizer.skipped_steps - skipped == (bad is not None)
    with torch.profiler.profile(profile_memory=True) as profile:
        optimizer._find_nonfinite(optimizer._plans[0], [large], {0: large.grad})
    largest = max(event.self_cpu_memory_usage for event in profile.key_averages())
    assert largest < large.nbytes // 100
