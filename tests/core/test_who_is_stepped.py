"""Loops as people write them: what torch.optim.AdamW moves, NorMuon moves, or it says what it does not."""

import warnings
from collections import defaultdict

import pytest
import torch
from torch import nn

from normuon_plugins import add_parameters, build_normuon


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=0.1)


def normuon(model):
    return build_normuon(model, lr=0.1)


def loss_of(model):
    return model(torch.arange(8)).square().sum()


def frozen_before_the_step(model, optimizer, step):
    loss_of(model).backward()
    model[1].requires_grad_(False)
    optimizer.step()
    model[1].requires_grad_(True)


def in_turns(model, optimizer, step):
    """One layer is active at a time, and both have gradients at the step: adapters, interleaved requests."""
    for layer in (1, 3):
        model.requires_grad_(False)
        model[layer].requires_grad_(True)
        loss_of(model).backward()
    optimizer.step()


def thawed_in_the_middle(model, optimizer, step):
    model[:2].requires_grad_(step >= 2)
    loss_of(model).backward()
    optimizer.step()


def state_looked_at(model, optimizer, step):
    for parameter in model.parameters():
        assert optimizer.state[parameter] is not None
    loss_of(model).backward()
    optimizer.step()


def state_reset(model, optimizer, step):
    loss_of(model).backward()
    optimizer.step()
    if step == 0:
        optimizer.state.clear()
    elif step == 1:
        optimizer.state = defaultdict(dict)
    else:
        optimizer.state[model[1].weight] = {}


@pytest.mark.parametrize("loop", [frozen_before_the_step, in_turns, thawed_in_the_middle, state_looked_at, state_reset])
def test_the_same_tensors_move_as_under_adamw(loop):
    def moved(make):
        model = network()
        if loop is thawed_in_the_middle:
            model[:2].requires_grad_(False)
        optimizer = make(model)
        steps = []
        for step in range(4):
            before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
            loop(model, optimizer, step)
            optimizer.zero_grad()
            steps.append({name for name, p in model.named_parameters() if not torch.equal(p, before[name])})
        return steps

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = moved(normuon)
    assert found == moved(adamw)
    assert all(found)


def test_plans_of_layers_in_turns_are_kept(monkeypatch):
    from normuon_plugins.core import optimizer as module

    planned = []
    plan_step = module.plan_step
    monkeypatch.setattr(module, "plan_step", lambda *args: planned.append(1) or plan_step(*args))
    model = network()
    optimizer = normuon(model)
    for step in range(8):
        model[1].requires_grad_(step % 2 == 0)
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(planned) == 2


def test_what_came_later_is_named_once_and_add_parameters_trains_it():
    model = network()
    optimizer = normuon(model)
    loss_of(model).backward()
    optimizer.step()
    model.append(nn.Linear(4, 4))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    optimizer.zero_grad()
    loss_of(model).backward()
    with pytest.warns(UserWarning, match=r"'4.weight' and 1 more of the model: .*add_parameters\(optimizer, model\)"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    before = model[4].weight.detach().clone()
    added = add_parameters(optimizer, model)
    assert added == ["4.weight", "4.bias"]
    assert add_parameters(optimizer, model) == []
    optimizer.step()
    schedule.step()  # torch wants as many groups as there were
    assert not torch.equal(model[4].weight, before)
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())


def test_frozen_layers_of_other_kinds_add_no_group():
    model = network()
    optimizer = build_normuon(model[3:], lr=0.1)
    model[0].requires_grad_(False)  # an embedding: no group is of its kind
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    groups = len(optimizer.param_groups)
    assert add_parameters(optimizer, model) == ["1.weight", "1.bias", "2.weight", "2.bias"]
    loss_of(model).backward()
    optimizer.step()
    schedule.step()
    assert len(optimizer.param_groups) == groups


def test_a_head_that_is_replaced_later_is_warned_about():
    model = network()
    optimizer = normuon(model)
    loss_of(model).backward()
    optimizer.step()
    model[3] = nn.Linear(4, 6)
    optimizer.zero_grad()
    loss_of(model).backward()
    with pytest.warns(UserWarning, match=r"'3.weight' and 1 more of the model"):
        optimizer.step()


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["float", "tensor"])
def test_a_compiled_step_is_the_step(lr):
    """A graph of an earlier step would go on without a layer that was frozen when it was made."""

    def trained(wrap):
        model = network()
        optimizer = build_normuon(model, lr=lr)
        step = wrap(optimizer.step)
        for index in range(4):
            model[1].requires_grad_(index != 1)
            loss_of(model).backward()
            step()
            optimizer.zero_grad()
        return list(model.parameters())

    eager, compiled = trained(lambda step: step), trained(lambda step: torch.compile(step, backend="eager"))
    assert all(map(torch.equal, eager, compiled))


def test_what_was_frozen_at_first_is_left_to_another_optimizer_in_its_turn():
    """A fine-tuning server: one optimizer per adapter, and gradients of both at a step."""

    def moved(make):
        model = network()
        for layer in (0, 2, 3):
            model[layer].requires_grad_(False)
        optimizer = make(model)
        loss_of(model).backward()
        model.requires_grad_(False)
        model[3].requires_grad_(True)
        loss_of(model).backward()
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        optimizer.step()
        return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = moved(normuon)
    assert found == moved(lambda model: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1))


def test_nothing_to_do_but_what_was_frozen_at_first_is_said():
    model = network()
    model[3].requires_grad_(False)
    optimizer = normuon(model)
    loss_of(model).backward()
    optimizer.step()
    model.zero_grad()
    model.requires_grad_(False)
    model[3].requires_grad_(True)
    loss_of(model).backward()
    before = model[3].weight.detach().clone()
    with pytest.warns(UserWarning, match=r"'3.weight' and 1 more of the model"):
        optimizer.step()
    add_parameters(optimizer, model)
    optimizer.step()
    assert not torch.equal(model[3].weight, before)


def test_a_group_that_is_added_is_divided_by_the_plan():
    """As torch's tutorials and Lightning's BaseFinetuning thaw a layer: parameters of all kinds, and one rate."""
    model = network()
    model[1].requires_grad_(False)
    optimizer = normuon(model)
    loss_of(model).backward()
    optimizer.step()
    model[1].requires_grad_(True)
    optimizer.add_param_group({"params": list(model[1].parameters()), "lr": 0.05})
    added = {name: group for group in optimizer.param_groups for name in group["param_names"] if name.startswith("1.")}
    assert {name: (group["algorithm"], group["lr"]) for name, group in added.items()} == {
        "1.weight": ("normuon", 0.05),
        "1.bias": ("adamw", 0.05),
    }
    before = [parameter.detach().clone() for parameter in model[1].parameters()]
    loss_of(model).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert not any(map(torch.equal, model[1].parameters(), before))
    assert [name for group in optimizer.param_groups for name in group["param_names"]].count("1.weight") == 1


def test_a_refused_part_of_an_added_group_leaves_the_optimizer_as_it_was():
    model = network()
    optimizer = normuon(model)
    model.append(nn.Linear(4, 4))
    groups = len(optimizer.param_groups)
    with pytest.raises(ValueError, match="is no parameter of the model"):
        optimizer.add_param_group({"params": [model[4].weight, nn.Parameter(torch.ones(4, 4))]})
    assert len(optimizer.param_groups) == groups
