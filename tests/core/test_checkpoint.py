"""state_dict: what is saved loads again, exactly, and what does not fit is refused before anything changes."""

import copy
import io

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from normuon_plugins import NorMuon, build_normuon
from tests.models import max_difference, tiny_llama, token_blocks

OPTIONS = {"lr": 0.01, "adamw_lr": 0.003, "nesterov": True, "ns_coefficients": (3.4445, -4.775, 2.0315)}


def train(model, optimizer, steps, start=0):
    for step in range(start, start + steps):
        batch = torch.utils.data.default_collate(token_blocks(4, seed=step))
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()


def trained(dtype=torch.float32, steps=3):
    model = tiny_llama().to(dtype)
    optimizer = build_normuon(model, **OPTIONS)
    train(model, optimizer, steps)
    return model, optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumed_run_equals_the_uninterrupted_one(dtype):
    model, optimizer = trained(dtype)
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    train(model, optimizer, 3, start=3)

    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    resumed = tiny_llama(seed=5).to(dtype)
    resumed.load_state_dict(weights)
    resumed_optimizer = build_normuon(resumed, lr=1.0)  # the checkpoint's options hold, as in torch
    resumed_optimizer.load_state_dict(state)
    train(resumed, resumed_optimizer, 3, start=3)
    assert max_difference(resumed, model) == 0


def test_second_moment_stays_float32_for_bfloat16_parameters():
    model, optimizer = trained(torch.bfloat16)
    loaded = build_normuon(model)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    buffers = 0
    for parameter, state in optimizer.state.items():
        if "second_momentum_buffer" in state:
            buffers += 1
            assert loaded.state[parameter]["second_momentum_buffer"].dtype == torch.float32
            assert torch.equal(loaded.state[parameter]["second_momentum_buffer"], state["second_momentum_buffer"])
    assert buffers == 14


# no_dist=True says that there is one process; torch warns all the same
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
# full and flattened together fails in torch 2.13 for torch.optim.AdamW too: KeyError 'param_groups.0.params.0'
@pytest.mark.parametrize(("full", "flatten"), [(False, False), (False, True), (True, False)])
def test_distributed_checkpoint_round_trip(tmp_path, flatten, full):
    model, optimizer = trained()
    options = StateDictOptions(full_state_dict=full, flatten_optimizer_state_dict=flatten)
    dcp.save(
        {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer, options=options)},
        checkpoint_id=tmp_path,
        no_dist=True,
    )
    train(model, optimizer, 2, start=3)

    resumed = tiny_llama(seed=5)
    resumed_optimizer = build_normuon(resumed, **OPTIONS)
    state = {
        "model": resumed.state_dict(),
        "optimizer": get_optimizer_state_dict(resumed, resumed_optimizer, options=options),
    }
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    set_model_state_dict(resumed, state["model"])
    set_optimizer_state_dict(resumed, resumed_optimizer, state["optimizer"], options=options)
    train(resumed, resumed_optimizer, 2, start=3)
    assert max_difference(resumed, model) == 0


def refused(optimizer, state_dict, message):
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state_dict)
    after = optimizer.state_dict()
    assert before["param_groups"] == after["param_groups"]
    assert before["state"].keys() == after["state"].keys()
    for key, state in before["state"].items():
        assert all(torch.equal(after["state"][key][name], value) for name, value in state.items())


def test_checkpoint_of_another_optimizer_is_refused():
    weight = torch.nn.Parameter(torch.ones(3, 3))
    weight.grad = torch.ones(3, 3)
    other = torch.optim.AdamW([weight])
    optimizer = NorMuon([weight])
    other.step(), optimizer.step()
    refused(optimizer, other.state_dict(), "another optimizer wrote it")


@pytest.mark.parametrize(
    ("pattern", "target", "message"),
    [
        (
            r"layers\.0\.self_attn\.q_proj",
            "adamw",
            r"'model.layers.0.self_attn.q_proj.weight' is on adamw here and on normuon with layout 'o i'",
        ),
        ("lm_head", "normuon", "'lm_head.weight' is on normuon with layout 'o i' here and on adamw in the checkpoint"),
        (r"1\.mlp\.up_proj", "i o", "'model.layers.1.mlp.up_proj.weight' is on normuon with layout 'i o' here"),
    ],
)
def test_another_plan_is_refused_by_the_name_of_the_parameter_that_moved(pattern, target, message):
    _, optimizer = trained()
    moved = build_normuon(tiny_llama(), overrides={pattern: target}, **OPTIONS)
    refused(moved, optimizer.state_dict(), message)


def test_groups_without_names_load_by_place():
    def optimizer(seed):
        torch.manual_seed(seed)
        weight, bias = (torch.nn.Parameter(torch.randn(shape)) for shape in ((3, 3), (3,)))
        weight.grad, bias.grad = torch.randn(3, 3), torch.randn(3)
        result = NorMuon([{"params": [weight]}, {"params": [bias], "algorithm": "adamw"}])
        result.step()
        return result

    saved, loaded = optimizer(0), optimizer(1)
    loaded.load_state_dict(saved.state_dict())
    for theirs, ours in zip(saved.state.values(), loaded.state.values(), strict=True):
        assert all(torch.equal(ours[key], value) for key, value in theirs.items())


def test_without_names_an_algorithm_that_changed_is_still_refused():
    weight = torch.nn.Parameter(torch.ones(3, 3))
    saved = NorMuon([weight]).state_dict()  # no state yet: nothing but the groups could tell
    refused(NorMuon([{"params": [weight], "algorithm": "adamw"}]), saved, "is on adamw here and on normuon")


def test_names_that_only_gained_a_prefix_are_the_same_names():
    # an optimizer built on a DistributedDataParallel model sees "module." before every name
    weight = torch.nn.Parameter(torch.ones(3, 3))
    saved = NorMuon([("module.weight", weight)], beta2=0.5).state_dict()
    optimizer = NorMuon([("weight", weight)])
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["beta2"] == 0.5
    assert optimizer.param_groups[0]["param_names"] == ["weight"]
    moved = NorMuon([{"params": [("weight", weight)], "layout": "i o"}])
    refused(moved, saved, "'weight' is on normuon with layout 'i o' here and on normuon with layout 'o i'")


def test_the_users_own_load_hooks_come_first():
    def optimizer(*order):
        parameters = {name: torch.nn.Parameter(torch.full((3, 3), value)) for name, value in (("a", 1.0), ("b", 2.0))}
        for parameter in parameters.values():
            parameter.grad = torch.diag(parameter[0].detach())
        result = NorMuon([(name, parameters[name]) for name in order])
        return result, parameters

    saved, parameters = optimizer("a", "b")
    saved.step()
    loaded, others = optimizer("b", "a")

    def reorder(_, state_dict):
        group = state_dict["param_groups"][0]
        return {**state_dict, "param_groups": [{**group, "params": [1, 0], "param_names": ["b", "a"]}]}

    loaded.register_load_state_dict_pre_hook(reorder)
    loaded.load_state_dict(saved.state_dict())
    for name in "ab":
        for key, value in saved.state[parameters[name]].items():
            assert torch.equal(loaded.state[others[name]][key], value)


def test_numpy_numbers_are_stored_as_python_numbers():
    weight = torch.nn.Parameter(torch.ones(3, 3))
    options = {"lr": np.float64(0.1), "momentum": np.float32(0.5), "ns_steps": np.int64(4)}
    file = io.BytesIO()
    torch.save(NorMuon([weight], **options, ns_coefficients=[3.4, -4.7, 2.0]).state_dict(), file)
    file.seek(0)
    group = torch.load(file, weights_only=True)["param_groups"][0]
    assert (group["lr"], group["momentum"], group["ns_steps"]) == (0.1, 0.5, 4)
    assert group["ns_coefficients"] == (3.4, -4.7, 2.0)


def test_parameter_of_another_shape_is_refused_by_name():
    def optimizer(rows):
        weight = torch.nn.Parameter(torch.ones(rows, 3))
        weight.grad = torch.ones(rows, 3)
        result = NorMuon([("weight", weight)])
        result.step()
        return result

    refused(optimizer(4), optimizer(5).state_dict(), r"'weight': momentum_buffer has shape \(5, 3\)")


def test_incomplete_state_is_refused_by_name():
    weight = torch.nn.Parameter(torch.ones(3, 3))
    weight.grad = torch.ones(3, 3)
    optimizer = NorMuon([("weight", weight)])
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["state"][0]["second_momentum_buffer"]
    refused(optimizer, saved, r"'weight' is on 'normuon' here; its checkpoint holds \['momentum_buffer'\]")


def test_checkpoint_from_before_an_option_existed_takes_its_value_from_init():
    weight = torch.nn.Parameter(torch.ones(3, 3))
    state = NorMuon([weight], beta2=0.5).state_dict()
    del state["param_groups"][0]["beta2"]
    optimizer = NorMuon([weight], beta2=0.7)
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["beta2"] == 0.7


def test_a_parameter_that_was_resized_after_the_first_step_is_named_with_both_shapes():
    table = torch.nn.Embedding(4, 3)
    optimizer = NorMuon([{"params": [("table", table.weight)], "algorithm": "adamw"}])
    table.weight.grad = torch.ones(4, 3)
    optimizer.step()
    table.weight.data = torch.ones(5, 3)
    table.weight.grad = torch.ones(5, 3)
    with pytest.raises(
        ValueError, match=r"'table' has shape \(5, 3\), its exp_avg \(4, 3\): the parameter was resized"
    ):
        optimizer.step()
