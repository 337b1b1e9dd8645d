"""int8 momentum and compensated bfloat16 weights on meshes: as in one process, and saved at two ranks for others."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from normuon_plugins import NorMuon
from tests.distributed import cases
from tests.distributed.test_sharded_checkpoint import FORMATS
from tests.ranks import run_ranks

# name -> dtype of the parameters, options
KINDS = {
    "bfloat16": (torch.float32, {"momentum_dtype": "bfloat16"}),
    "int8": (torch.float32, {"momentum_dtype": "int8"}),
    "int8 and compensated": (torch.bfloat16, {"momentum_dtype": "int8", "kahan_sum": True}),
}
# int8 where rows are divided: the columns of these small parameters are shorter than a block.
WAYS = {
    "bfloat16": ("columns, uneven and empty", "rows and columns", "expert parallel"),
    "int8": (
        *("fsdp", "fsdp offloaded", "packed tensor parallel", "replicated"),
        *("hsdp", "rows then replicas", "fsdp over column-wise tp", "expert parallel"),
    ),
    "int8 and compensated": ("fsdp", "hsdp"),
}
SAVED_AT, CONTINUED_TO = 3, 5
# What is saved.
KIND = "int8 and compensated"


def optimizer_of(model, kind, **options):
    return cases.optimizer_of(model.named_parameters(), bucket_bytes=2000, **KINDS[kind][1], **options)


def stored(model, optimizer):
    """Return weights and state as whole tensors, by name, as they are stored; codes as float32 numbers."""
    found = {}
    for name, parameter in model.named_parameters():
        short = name.split(".")[-1]
        found[short] = cases.gathered(parameter)
        for key, value in optimizer.state[parameter].items():
            found[f"{short}.{key}"] = cases.gathered(value.float() if value.dtype == torch.int8 else value)
    return found


def meant(model, optimizer):
    """Return weights and state as whole tensors, by name, as numbers; one block of int8 momentum per row."""
    found = stored(model, optimizer)
    for key in [key for key in found if key.endswith(".momentum_scale")]:
        name = key.removesuffix(".momentum_scale")
        found[f"{name}.momentum"] = found.pop(f"{name}.momentum_buffer") * found.pop(key)
    for key in [key for key in found if key.endswith(".kahan_compensation")]:
        name = key.removesuffix(".kahan_compensation")
        found[f"{name}.exact"] = found[name].double() + found.pop(key).double()
    return found


def difference(found, expected):
    assert found.keys() == expected.keys()
    return {
        key: float((found[key].double() - value.double()).norm() / value.double().norm().clamp_min(1e-30))
        for key, value in expected.items()
    }


def limit(kind, name):
    """Return the difference that is rounding: a compensated weight is known to 16 bits, what is stored in 16 to 8."""
    return 1e-5 if kind != KIND or name.endswith(".exact") else 2**-8


def compare():
    """Return, by way and kind, how far a run is from one process, and whether scales lie like their parameters."""
    results = {}
    for kind, (dtype, _) in KINDS.items():
        model = cases.plain(dtype)
        optimizer = optimizer_of(model, kind)
        cases.steps(model, optimizer, 0, 4)
        expected = meant(model, optimizer)
        for way, make in cases.ways(dtype).items():
            if way not in WAYS[kind]:
                continue
            model = make()
            optimizer = optimizer_of(model, kind)
            cases.steps(model, optimizer, 0, 4)
            results[way, kind] = difference(meant(model, optimizer), expected)
            for parameter in model.parameters():
                assert isinstance(parameter, DTensor)
                for key in optimizer.state[parameter].keys() & {"momentum_scale", "kahan_compensation"}:
                    assert optimizer.state[parameter][key].placements == parameter.placements
    return results


def test_sharded_runs_equal_one_process():
    for results in run_ranks(compare, 4):
        assert len(results) == sum(map(len, WAYS.values()))
        for key, found in results.items():
            assert {name: value for name, value in found.items() if not value < limit(key[1], name)} == {}, key


# Rows of whole blocks on two ranks; experts and transposed weights have other row dimensions.
WIDE = {"columns": ("o i", (3, 1024)), "experts": ("e o i", (2, 3, 512)), "transposed": ("i o", (4, 512))}


def wide(place, **options):
    """Return a model of wide parameters, and its optimizer."""
    generator = torch.Generator().manual_seed(0)
    drawn = {name: torch.randn(shape, generator=generator) for name, (_, shape) in WIDE.items()}
    model = nn.ParameterDict({name: nn.Parameter(place(tensor)) for name, tensor in drawn.items()})
    groups = [{"params": [(name, model[name])], "layout": layout} for name, (layout, _) in WIDE.items()]
    return model, NorMuon(groups, lr=0.1, ns_dtype="float32", **options)


def wide_steps(model, optimizer, *dtypes):
    """Take a step with momentum in each of ``dtypes``."""
    for step, dtype in enumerate(dtypes):
        generator = torch.Generator().manual_seed(step)
        for group in optimizer.param_groups:
            group["momentum_dtype"] = dtype
        for name, (_, shape) in WIDE.items():
            gradient = torch.randn(shape, generator=generator) * torch.logspace(-1, 1, shape[-1])
            model[name].grad = cases.place_like(gradient, model[name])
        optimizer.step()


def columns():
    """Return the differences of column shards from one process, by what was done, and the messages for bad shards."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def by_columns(tensor):
        return distribute_tensor(tensor, mesh, [Shard(tensor.ndim - 1)], src_data_rank=None)

    found = {}
    for dtypes in (("int8", "int8", "int8"), ("float32", "int8", "bfloat16", "int8")):
        runs = [wide(place) for place in (by_columns, torch.clone)]
        for run in runs:
            wide_steps(*run, *dtypes)
        found[dtypes] = difference(stored(*runs[0]), stored(*runs[1]))
    model, optimizer = runs[0]
    options = StateDictOptions(full_state_dict=True)
    states = get_model_state_dict(model, options=options), get_optimizer_state_dict(model, optimizer, options=options)
    loaded = wide(by_columns, momentum_dtype="int8")
    set_model_state_dict(loaded[0], states[0], options=options)
    set_optimizer_state_dict(*loaded, states[1], options=options)
    for run in (loaded, runs[1]):
        wide_steps(*run, "int8")
    found["loaded"] = difference(stored(*loaded), stored(*runs[1]))
    return found, [refusal(mesh, layout, shape) for layout, shape in (("o i", (4, 600)), ("o i i", (4, 256, 2)))]


def refusal(mesh, layout, shape):
    """Return the message for shards of the second dimension, and whether its remedy works."""
    weight = nn.Parameter(distribute_tensor(torch.ones(shape), mesh, [Shard(1)], src_data_rank=None))
    optimizer = NorMuon([{"params": [("weight", weight)], "layout": layout}], momentum_dtype="int8")
    with pytest.raises(ValueError, match="'weight' is ") as caught:
        optimizer.step()
    untouched = not optimizer.state
    optimizer.param_groups[0]["momentum_dtype"] = "bfloat16"
    optimizer.step()
    return str(caught.value), untouched and optimizer.state[weight]["momentum_buffer"].dtype == torch.bfloat16


def test_columns_are_divided_at_whole_blocks_only():
    for found, refusals in run_ranks(columns, 2):
        for done, differences in found.items():
            assert {key: value for key, value in differences.items() if not value < 1e-6} == {}, done
        for message, is_mended in refusals:
            assert "Shard(dim=1)" in message
            assert "momentum_dtype='bfloat16'" in message
            assert is_mended
        assert "a shard holds 0 to 300 of 600" in refusals[0][0]


def make(way):
    model = cases.ways(KINDS[KIND][0])[way]()
    return model, optimizer_of(model, KIND)


def save(folder):
    """Save in all formats, and what a resumed run must find and become."""
    model, optimizer = make("fsdp")
    cases.steps(model, optimizer, 0, SAVED_AT)
    for name, options in FORMATS.items():
        states = {
            "model": get_model_state_dict(model, options=StateDictOptions(**options)),
            "optimizer": get_optimizer_state_dict(model, optimizer, options=StateDictOptions(**options)),
        }
        if name != "full":
            dcp.save(states, checkpoint_id=folder / name)
        elif dist.get_rank() == 0:
            torch.save(states, folder / name)
    now = stored(model, optimizer)
    cases.steps(model, optimizer, SAVED_AT, CONTINUED_TO)
    then = meant(model, optimizer)
    if dist.get_rank() == 0:
        torch.save((now, then), folder / "expected")
    dist.barrier()


def load(folder, name, way):
    """Load one format into a fresh model; return which tensors differ, and differences after going on."""
    model, optimizer = make(way)
    options = StateDictOptions(**FORMATS[name], broadcast_from_rank0=name == "full")
    states = {"model": {}, "optimizer": {}}
    if name != "full":
        plain = StateDictOptions(**FORMATS[name])
        states = {
            "model": get_model_state_dict(model, options=plain),
            "optimizer": get_optimizer_state_dict(model, optimizer, options=plain),
        }
        dcp.load(states, checkpoint_id=folder / name)
    elif dist.get_rank() == 0:
        states = torch.load(folder / name, weights_only=True)
    set_model_state_dict(model, states["model"], options=options)
    set_optimizer_state_dict(model, optimizer, states["optimizer"], options=options)
    now, then = torch.load(folder / "expected", weights_only=True)
    found = stored(model, optimizer)
    assert found.keys() == now.keys()
    changed = [key for key in now if found[key].dtype != now[key].dtype or not torch.equal(found[key], now[key])]
    cases.steps(model, optimizer, SAVED_AT, CONTINUED_TO)
    return changed, difference(meant(model, optimizer), then)


def load_all(folder):
    ways = ["fsdp", "hsdp"] if dist.get_world_size() == 4 else ["fsdp"]
    return {(way, name): load(folder, name, way) for way in ways for name in FORMATS}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    run_ranks(save, 2, folder)
    return folder


@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_small_state_of_two_ranks_loads_anywhere_bit_by_bit_and_goes_on(checkpoint, world_size):
    for results in run_ranks(load_all, world_size, checkpoint):
        for key, (changed, found) in results.items():
            assert changed == [], key
            assert {name: value for name, value in found.items() if not value < limit(KIND, name)} == {}, key
