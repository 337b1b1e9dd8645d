"""An optimizer whose parameters are not the model's any more says so at its first step."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from normuon_plugins import NorMuon, build_normuon, plan_parameters


def model_and_loss():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    return model, lambda: model(torch.ones(2, 4)).square().sum()


def replace_parameters(model):
    """Do what fully_shard and to_empty do: put new parameters in the place of the old ones."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.detach().clone()))


def test_parameters_replaced_after_building_are_named_with_the_remedy():
    model, loss = model_and_loss()
    optimizer = build_normuon(model)
    replace_parameters(model)
    loss().backward()
    with pytest.raises(RuntimeError, match=r"'0.weight' and 3 more of the 4 parameters.*setup_normuon.*one call"):
        optimizer.step()
    assert not optimizer.state


def test_one_lost_parameter_is_enough():
    model, loss = model_and_loss()
    optimizer = build_normuon(model)
    model[1] = nn.Linear(4, 3)
    loss().backward()
    with pytest.raises(RuntimeError, match=r"'1.weight' and 1 more of the 4 .* Build the optimizer afterwards\.$"):
        optimizer.step()


def test_parameters_added_by_the_user_need_not_belong_to_the_model():
    model, loss = model_and_loss()
    optimizer = build_normuon(model)
    temperature = nn.Parameter(torch.ones(()))
    optimizer.add_param_group({"params": [("temperature", temperature)], "algorithm": "adamw"})
    (loss() * temperature).backward()
    optimizer.step()
    assert temperature.item() != 1


def test_hooks_of_the_user_run_beside_the_question():
    """The question removed its own hook once, and torch failed on the next one: OrderedDict mutated."""
    model, loss = model_and_loss()
    optimizer = build_normuon(model)
    called = []
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))
    for _ in range(2):
        loss().backward()
        optimizer.step()
    assert called == ["before", "after"] * 2


def test_the_question_is_asked_once():
    model, loss = model_and_loss()
    optimizer = build_normuon(model)
    loss().backward()
    optimizer.step()
    replace_parameters(model)
    optimizer.step()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_copies_are_not_asked_about_another_model(copied):
    model, _ = model_and_loss()
    optimizer = copied(build_normuon(model))
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert optimizer.state


def test_the_model_is_not_kept_alive():
    model, loss = model_and_loss()
    optimizer = build_normuon(model)
    loss().backward()
    del model, loss
    optimizer.step()
    assert optimizer.state


def test_hand_made_groups_without_any_gradient_at_the_first_step_are_warned_about_once():
    model, loss = model_and_loss()
    optimizer = NorMuon(plan_parameters(model).param_groups())
    replace_parameters(model)
    loss().backward()
    with pytest.warns(UserWarning, match=r"None of the 4 parameters .* has a gradient at its first step"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
