"""What is loaded goes to the parameter of its name, as a copy, with whatever else lies beside it."""

import copy
import json

import pytest
import torch
from torch import nn

from normuon_plugins import NorMuon, build_normuon, plan_parameters


def stepped(*names, seed=0, wrap=lambda name: name, **options):
    """Return parameters by name, and an optimizer that stepped them once with gradients of their own."""
    torch.manual_seed(seed)
    weights = {name: nn.Parameter(torch.randn(4, 4)) for name in names}
    for name, weight in weights.items():
        weight.grad = torch.randn(4, 4, generator=torch.Generator().manual_seed(sum(map(ord, name))))
    optimizer = NorMuon([(wrap(name), weight) for name, weight in weights.items()], **options)
    optimizer.step()
    return weights, optimizer


def momenta(weights, optimizer):
    return {name: optimizer.state[weight].get("momentum_buffer") for name, weight in weights.items()}


@pytest.mark.parametrize(
    ("saved", "here"),
    [
        ((lambda name: name), (lambda name: f"module.{name}")),
        ((lambda name: f"module.{name}"), (lambda name: name)),
        ((lambda name: f"layers.{name}._orig_mod.weight"), (lambda name: f"layers.{name}.weight")),
        ((lambda name: f"{name}.weight"), (lambda name: f"{name}._checkpoint_wrapped_module.weight")),
    ],
    ids=["prefix here", "prefix there", "compiled", "checkpointed"],
)
def test_another_order_and_wrappers_are_matched_by_name(saved, here):
    weights, optimizer = stepped("a", "b", "c", wrap=saved)
    others, loaded = stepped("c", "a", "b", seed=1, wrap=here)
    loaded.load_state_dict(optimizer.state_dict())
    expected, found = momenta(weights, optimizer), momenta(others, loaded)
    assert all(torch.equal(found[name], expected[name]) for name in "abc")


def test_layer_1_is_not_layer_0():
    _, optimizer = stepped("layers.1.weight")
    _, loaded = stepped("layers.0.weight", seed=1)
    with pytest.raises(ValueError, match=r"only here: 'layers.0.weight'; only in the checkpoint: 'layers.1.weight'"):
        loaded.load_state_dict(optimizer.state_dict())


def test_one_projection_less_names_that_projection():
    _, optimizer = stepped("q", "k", "v")
    _, loaded = stepped("q", "v", seed=1)
    with pytest.raises(ValueError, match=r"trained other parameters; only in the checkpoint: 'k'\. Freeze"):
        loaded.load_state_dict(optimizer.state_dict())


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4))


def backward(model):
    model.zero_grad()
    model(torch.arange(8.0).view(2, 4)).square().sum().backward()


def thawing(model):
    """Train the last layers, then all, as gradual unfreezing does; return the optimizer."""
    model[0].requires_grad_(False)
    optimizer = build_normuon(model, lr=0.1)
    for _ in range(2):
        backward(model)
        optimizer.step()
        model[0].requires_grad_(True)
    return optimizer


def test_a_layer_that_was_thawed_in_the_run_is_found_by_the_process_that_resumes():
    model = network()
    optimizer = thawing(model)
    other = network()
    other.load_state_dict(model.state_dict())
    other[0].requires_grad_(False)  # as in the first process: a callback thaws it later
    resumed = build_normuon(other, lr=0.1)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other.requires_grad_(True)
    for each, its in ((model, optimizer), (other, resumed)):
        backward(each)
        its.step()
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    assert len(resumed.state) == len(list(other.parameters()))


def test_a_refused_checkpoint_thaws_nothing():
    saved = copy.deepcopy(thawing(network()).state_dict())
    group = next(group for group in saved["param_groups"] if group["algorithm"] == "normuon")
    group["layout"] = "i o"
    other = network()
    other[0].requires_grad_(False)
    optimizer = build_normuon(other, lr=0.1)
    names = [list(group["param_names"]) for group in optimizer.param_groups]
    with pytest.raises(ValueError, match="with layout 'i o' in the checkpoint"):
        optimizer.load_state_dict(saved)
    assert [group["param_names"] for group in optimizer.param_groups] == names
    assert [len(group["params"]) for group in optimizer.param_groups] == [len(each) for each in names]
    other[0].requires_grad_(True)
    before = other[0].weight.detach().clone()
    backward(other)
    optimizer.step()  # it waited on, and is thawed now
    assert not torch.equal(other[0].weight, before)


def test_a_checkpoint_from_before_the_thaw_loads_while_the_layer_is_frozen():
    model = network()
    model[0].requires_grad_(False)
    optimizer = build_normuon(model, lr=0.1)
    backward(model)
    optimizer.step()
    everything = NorMuon(plan_parameters(model, include_frozen=True).param_groups(), lr=0.1)
    everything.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert {name for name, p in model.named_parameters() if everything.state.get(p)} == {
        "1.weight", "1.bias", "2.weight", "2.bias",
    }  # fmt: skip


def test_other_groups_are_refused_since_options_belong_to_groups():
    _, optimizer = stepped("a", "b")
    weights, _ = stepped("a", "b")
    split = NorMuon(
        [
            {"params": [(name, weight)], "lr": rate}
            for (name, weight), rate in zip(weights.items(), (0.1, 0.2), strict=True)
        ]
    )
    with pytest.raises(ValueError, match=r"'a' and 'b' are in one group on one side and in two on the other"):
        split.load_state_dict(optimizer.state_dict())


def test_two_models_of_one_kind_keep_apart():
    def pair():
        torch.manual_seed(0)
        models = [nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2)]
        groups = [group for model in models for group in plan_parameters(model).param_groups()]
        return models, NorMuon(groups, lr=0.1)

    def train(models, optimizer):
        models[1](models[0](torch.ones(2, 4)).tanh()).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    models, optimizer = pair()
    train(models, optimizer)
    others, loaded = pair()
    for other, model in zip(others, models, strict=True):
        other.load_state_dict(model.state_dict())
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(models, optimizer)
    train(others, loaded)
    for other, model in zip(others, models, strict=True):
        assert all(map(torch.equal, other.parameters(), model.parameters()))


def test_names_of_the_checkpoint_stay_where_this_optimizer_has_none():
    _, optimizer = stepped("a", "b")
    loaded = NorMuon([nn.Parameter(torch.ones(4, 4)) for _ in range(2)])
    loaded.load_state_dict(optimizer.state_dict())
    assert loaded.param_groups[0]["param_names"] == ["a", "b"]


def test_loading_ties_nothing_together_and_a_snapshot_loads_twice():
    weights, optimizer = stepped("a")
    live = optimizer.state_dict()
    snapshot = copy.deepcopy(live)
    others, loaded = stepped("a", seed=1)
    loaded.load_state_dict(live)
    loaded.step()
    assert torch.equal(momenta(weights, optimizer)["a"], snapshot["state"][0]["momentum_buffer"])
    results = []
    for _ in range(2):
        others["a"].data.fill_(1.0)
        loaded.load_state_dict(snapshot)
        loaded.step()
        results.append(others["a"].detach().clone())
    assert torch.equal(*results)


def test_keys_of_others_travel_along():
    """Lookahead and Grokfast keep their own numbers in ``optimizer.state``."""
    weights, optimizer = stepped("a")
    optimizer.state[weights["a"]]["slow_buffer"] = torch.full((4, 4), 7.0)
    optimizer.state[weights["a"]]["note"] = {"k": 5}
    optimizer.step()
    others, loaded = stepped("a", seed=1)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    loaded.step()
    state = loaded.state[others["a"]]
    assert torch.equal(state["slow_buffer"], torch.full((4, 4), 7.0))
    assert state["note"] == {"k": 5}


def test_a_step_that_went_through_json_is_a_number():
    weights = []
    for _ in range(2):
        bias = nn.Parameter(torch.arange(4.0))
        bias.grad = torch.ones(4)
        weights.append((bias, NorMuon([{"params": [("bias", bias)], "algorithm": "adamw"}], lr=0.1)))
    (bias, optimizer), (other, loaded) = weights
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["step"] = json.loads(json.dumps(saved["state"][0]["step"].item()))
    other.data.copy_(bias)
    loaded.load_state_dict(saved)
    optimizer.step(), loaded.step()
    assert torch.equal(bias, other)


def test_one_tensor_as_learning_rate_is_one_per_group_also_after_loading():
    model = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4))
    optimizer = build_normuon(model, lr=torch.tensor(0.1))
    for _ in range(2):
        optimizer.load_state_dict(optimizer.state_dict())
        assert len({id(group["lr"]) for group in optimizer.param_groups}) == len(optimizer.param_groups)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    for _ in range(3):
        schedule.step(1.0)
    assert [round(group["lr"].item(), 6) for group in optimizer.param_groups] == [0.025] * len(optimizer.param_groups)
