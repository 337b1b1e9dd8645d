"""Groups that somebody else made, divided by the plan: what each parameter gets is what torch's AdamW gives it."""

import pytest
import torch
from torch import nn

from normuon_plugins import NorMuon, plan_parameters
from normuon_plugins.core.build_from_groups import build_from_groups
from normuon_plugins.core.planned_groups import planned_groups
from tests.models import tiny_llama

RATES = {"lr": 0.01, "weight_decay": 0.05}


def plan_of(model):
    return plan_parameters(model, include_frozen=True)


def values(optimizer, key):
    """Return parameter -> what its group says of ``key``."""
    return {id(p): group[key] for group in optimizer.param_groups for p in group["params"]}


def halves(model):
    lower = [p for name, p in model.named_parameters() if "layers.0." in name]
    upper = [p for name, p in model.named_parameters() if "layers.0." not in name]
    return lower, upper


def test_every_parameter_keeps_the_rate_and_decay_that_adamw_would_give_it():
    model = tiny_llama()
    lower, upper = halves(model)

    def given():
        return [{"params": lower, "lr": 1e-5, "weight_decay": 0.0}, {"params": iter(upper), "weight_decay": 0.3}]

    theirs = torch.optim.AdamW(given(), **RATES)
    ours = build_from_groups(model, given(), **RATES)
    for key in ("lr", "weight_decay"):
        assert values(ours, key) == values(theirs, key)
    planned = {id(row.parameter): (row.algorithm, row.layout) for row in plan_of(model)}
    routes = {id(p): (g["algorithm"], g.get("layout")) for g in ours.param_groups for p in g["params"]}
    assert routes == planned


def test_a_group_without_decay_of_its_own_takes_that_of_the_plan():
    model = tiny_llama()
    lower, upper = halves(model)
    optimizer = build_from_groups(model, [{"params": lower}, {"params": upper}], **RATES, adamw_weight_decay=0.2)
    decays = {group["name"].split("/")[1]: group["weight_decay"] for group in optimizer.param_groups}
    assert decays == {"normuon_o_i": 0.05, "adamw": 0.2, "adamw_no_decay": 0.0}


@pytest.mark.parametrize("named", [False, True])
def test_bare_parameters_become_the_groups_of_the_plan(named):
    model = tiny_llama()
    plan = plan_of(model)
    given = model.parameters() if not named else [(f"mine.{name}", p) for name, p in model.named_parameters()]
    assert planned_groups(plan, given) == plan.param_groups()


def test_keys_that_nobody_knows_stay_and_the_given_groups_stay_as_they_are():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    given = {"params": list(model.parameters()), "lr": 0.1, "initial_lr": 0.2, "name": "all", "mine": "x"}
    before = dict(given)
    groups = planned_groups(plan_of(model), [given])
    assert given == before
    assert [group["name"] for group in groups] == ["all/normuon_o_i", "all/adamw_no_decay"]
    assert all((group["lr"], group["initial_lr"], group["mine"]) == (0.1, 0.2, "x") for group in groups)


def test_names_are_unique_also_among_groups_that_exist():
    first, second = nn.Linear(3, 4), nn.Linear(4, 3)
    model = nn.Sequential(first, second)
    given = [{"params": part.parameters(), "name": "part"} for part in (first, second)]
    names = [group["name"] for group in planned_groups(plan_of(model), given, taken=["part/normuon_o_i"])]
    assert names == ["part/normuon_o_i_2", "part/adamw_no_decay", "part/normuon_o_i_3", "part/adamw_no_decay_2"]


def test_a_group_made_for_normuon_is_left_as_it_is_and_torch_takes_it_beside_the_others():
    model, stranger = nn.Linear(3, 4), nn.Parameter(torch.ones(4, 3))
    transposed = {"params": [stranger], "algorithm": "normuon", "layout": "i o", "lr": 0.5}
    adamw = {"params": [("weight", model.weight)], "algorithm": "adamw"}
    groups = planned_groups(plan_of(model), [transposed, adamw, {"params": model.bias}])
    optimizer = NorMuon(groups)
    found = [(g["algorithm"], g.get("layout"), g["param_names"]) for g in optimizer.param_groups]
    assert found == [("normuon", "i o", ["group_0.0"]), ("adamw", None, ["weight"]), ("adamw", None, ["bias"])]


def test_groups_of_another_optimizer_are_taken_with_their_state_of_a_schedule():
    model = nn.Linear(3, 4)
    theirs = torch.optim.AdamW(model.named_parameters(), lr=0.1)
    torch.optim.lr_scheduler.LambdaLR(theirs, lambda step: 0.5)
    optimizer = build_from_groups(model, theirs.param_groups)
    assert {(group["lr"], group["initial_lr"]) for group in optimizer.param_groups} == {(0.05, 0.1)}


def test_empty_groups_and_frozen_parameters_that_nobody_could_train_are_left_out():
    model = nn.Linear(3, 4)
    model.codes = nn.Parameter(torch.ones(4, dtype=torch.uint8), requires_grad=False)
    groups = planned_groups(plan_of(model), [{"params": []}, {"params": model.parameters()}])
    assert [name for group in groups for name, _ in group["params"]] == ["weight", "bias"]


def test_a_frozen_parameter_that_is_given_trains_when_it_thaws_and_one_that_is_not_is_not_complained_about():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    optimizer = build_from_groups(model, [model[0].weight, model[1].weight], lr=0.1)
    model[0].requires_grad_(True)
    before = {name: p.clone() for name, p in model.named_parameters()}
    model(torch.ones(2, 3)).square().sum().backward()
    with pytest.warns(UserWarning, match=r"'0\.bias' .*no group") as told:  # it thawed; 1.bias was known to be left out
        optimizer.step()
    assert len(told) == 1
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"0.weight", "1.weight"}


@pytest.mark.parametrize("name", [None, "theirs"])
def test_a_parameter_of_another_model_is_named_with_the_remedy(name):
    stranger = nn.Parameter(torch.ones(2, 5))
    entry = stranger if name is None else (name, stranger)
    which = "parameter 0 of group 'group_0'" if name is None else "'theirs'"
    with pytest.raises(ValueError, match=rf"{which}, of shape \(2, 5\), is no parameter.*'algorithm': 'adamw'"):
        planned_groups(plan_of(nn.Linear(3, 4)), [entry])


WRONG = {
    "tensor": (lambda p: p, TypeError, "single tensor"),
    "set": (lambda p: [{"params": {p}}], TypeError, "is a set"),
    "number": (lambda p: [p, 3], TypeError, "holds a int"),
    "no params": (lambda p: [{"lr": 0.1}], ValueError, r"has no 'params'; its keys are \['lr'\]"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_torch_refuses_is_refused(kind):
    model = nn.Linear(3, 4)
    make, error, message = WRONG[kind]
    with pytest.raises(error, match=message):
        build_from_groups(model, make(model.weight))


def test_a_parameter_in_two_groups_is_refused_by_torch():
    model = nn.Linear(3, 4)
    with pytest.raises(ValueError, match="more than one parameter group"):
        build_from_groups(model, [{"params": [model.weight]}, {"params": [model.weight], "lr": 0.1}])


def test_an_option_that_no_group_reads_is_told():
    model = tiny_llama()
    groups = [{"params": half, "lr": 0.1} for half in halves(model)]
    with pytest.warns(UserWarning, match=r"adamw_lr=0\.5 is not read: each of the given groups has its own lr"):
        build_from_groups(model, groups, adamw_lr=0.5)
