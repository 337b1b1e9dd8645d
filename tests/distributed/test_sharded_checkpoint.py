"""Saved at two ranks, loaded at one to four and on other meshes: difference 0.0, and the run goes on undisturbed."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from normuon_plugins.diagnostics import read_checkpoint
from normuon_plugins.diagnostics.dcp_folder import read_folder
from tests.distributed import cases
from tests.ranks import run_ranks

# name -> options of get and set; what is "full" is one file of rank 0, the rest are files of every rank. Full and
# flattened together cannot be loaded in torch 2.13, with torch.optim.AdamW as little as with ours.
FORMATS = {
    "plain": {},
    "flattened": {"flatten_optimizer_state_dict": True},
    "offloaded": {"cpu_offload": True},
    "full": {"full_state_dict": True, "cpu_offload": True},
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SAVED_AT, CONTINUED_TO = 3, 5


def make(way, dtype, **options):
    """Return a model laid out in one of the ways, and its optimizer."""
    model = cases.ways(DTYPES[dtype])[way]()
    return model, cases.optimizer_of(model.named_parameters(), bucket_bytes=2000, **options)


def save(folder):
    """Save in all formats and both dtypes, and what a resumed run must find and become."""
    for dtype in DTYPES:
        model, optimizer = make("fsdp", dtype)
        cases.steps(model, optimizer, 0, SAVED_AT)
        for name, options in FORMATS.items():
            states = {
                "model": get_model_state_dict(model, options=StateDictOptions(**options)),
                "optimizer": get_optimizer_state_dict(model, optimizer, options=StateDictOptions(**options)),
            }
            target = folder / f"{name}-{dtype}"
            if name == "full":
                torch.save(states, target) if dist.get_rank() == 0 else None
            else:
                dcp.save(states, checkpoint_id=target)
        now = cases.whole_run(model, optimizer)
        cases.steps(model, optimizer, SAVED_AT, CONTINUED_TO)
        then = cases.whole_run(model, optimizer)
        if dist.get_rank() == 0:
            torch.save((now, then), folder / f"expected-{dtype}")
    dist.barrier()


def load(folder, name, dtype, way):
    """Load one format into a fresh model; return differences now and after going on, and the dtypes of the state."""
    # The learning rate of the checkpoint holds, also for a plan that was made before it was loaded.
    model, optimizer = make(way, dtype, lr=0.9)
    options = StateDictOptions(**FORMATS[name], broadcast_from_rank0=name == "full")
    target = folder / f"{name}-{dtype}"
    if name == "full":
        states = torch.load(target, weights_only=True) if dist.get_rank() == 0 else {"model": {}, "optimizer": {}}
    else:
        plain = StateDictOptions(**FORMATS[name])
        states = {
            "model": get_model_state_dict(model, options=plain),
            "optimizer": get_optimizer_state_dict(model, optimizer, options=plain),
        }
        dcp.load(states, checkpoint_id=target)
    set_model_state_dict(model, states["model"], options=options)
    set_optimizer_state_dict(model, optimizer, states["optimizer"], options=options)
    now, then = torch.load(folder / f"expected-{dtype}", weights_only=True)
    found = cases.whole_run(model, optimizer)
    exact = all(torch.equal(found[key], expected) for key, expected in now.items()) and found.keys() == now.keys()
    seconds = {
        value.dtype
        for state in optimizer.state.values()
        for key, value in state.items()
        if key == "second_momentum_buffer" and isinstance(value, DTensor)
    }
    cases.steps(model, optimizer, SAVED_AT, CONTINUED_TO)
    found = cases.whole_run(model, optimizer)
    difference = max(
        float((found[key].double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))
        for key, expected in then.items()
    )
    return exact, difference, seconds


def load_all(folder):
    found = {}
    ways = ["fsdp"]
    if dist.get_world_size() == 4:
        ways += ["hsdp", "fsdp over column-wise tp", "rows and columns"]
    for way in ways:
        for name in FORMATS:
            for dtype in DTYPES:
                found[way, name, dtype] = load(folder, name, dtype, way)
    return found


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    run_ranks(save, 2, folder)
    return folder


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_a_checkpoint_of_two_ranks_loads_anywhere_and_goes_on(checkpoint, world_size):
    for found in run_ranks(load_all, world_size, checkpoint):
        for key, (exact, difference, seconds) in found.items():
            assert exact, key
            assert difference < (1e-6 if "float32" in key else 2**-8), (key, difference)
            assert seconds == {torch.float32}, key


@pytest.mark.parametrize("name", ["plain", "flattened", "offloaded"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_diagnostics_read_the_folder_of_two_ranks_as_torch_does(checkpoint, name, dtype, tmp_path):
    folder = checkpoint / f"{name}-{dtype}"
    dcp_to_torch_save(folder, tmp_path / "whole.pt")
    expected = flat(torch.load(tmp_path / "whole.pt", weights_only=True)["optimizer"])
    found = flat(read_folder(folder, lambda part: torch.load(part, weights_only=True))["optimizer"])
    assert found.keys() == expected.keys()
    assert sum(isinstance(value, torch.Tensor) for value in found.values()) > 10
    for key, value in expected.items():
        assert torch.equal(found[key], value) if isinstance(value, torch.Tensor) else found[key] == value
    assert len(read_checkpoint(folder).matrices) > 3


def flat(value, path=()):
    """Return path -> entry of dicts and lists in each other."""
    if isinstance(value, (dict, list)) and value:
        entries = value.items() if isinstance(value, dict) else enumerate(value)
        return {name: entry for key, inner in entries for name, entry in flat(inner, (*path, key)).items()}
    return {path: value}


def load_under_another_plan(folder):
    """Return the message when a parameter moved to the other algorithm, and whether the optimizer stayed as it was."""
    model = cases.fsdp(init_device_mesh("cpu", (dist.get_world_size(),)))()
    named = list(model.named_parameters())
    moved = [pair for pair in named if pair[0] == "tall"]
    rest = [pair for pair in named if pair[0] not in ("tall",)]
    optimizer = cases.optimizer_of(rest, bucket_bytes=2000)
    optimizer.add_param_group({"params": moved, "algorithm": "adamw", "name": "moved"})
    states = torch.load(folder / "full-float32", weights_only=True) if dist.get_rank() == 0 else {"optimizer": {}}
    options = StateDictOptions(**FORMATS["full"], broadcast_from_rank0=True)
    before = {name: cases.gathered(parameter) for name, parameter in named}
    try:
        set_optimizer_state_dict(model, optimizer, states["optimizer"], options=options)
    except (ValueError, KeyError, RuntimeError) as error:
        unchanged = all(torch.equal(cases.gathered(parameter), before[name]) for name, parameter in named)
        return f"{type(error).__name__}: {error}", unchanged
    return None, False


def test_a_checkpoint_whose_parameter_changed_algorithm_is_refused_by_name(checkpoint):
    for message, unchanged in run_ranks(load_under_another_plan, 2, checkpoint):
        assert message is not None
        assert "tall" in message
        assert unchanged
