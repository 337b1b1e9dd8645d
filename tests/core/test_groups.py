"""What a parameter group may hold, and how refusals read."""

import inspect

import pytest
import torch
from torch import nn

from normuon_plugins import NorMuon, build_normuon, plan_parameters
from normuon_plugins.core.group_options import CHECKS, GROUP_KEYS
from normuon_plugins.core.step_plan import BATCH_OPTIONS
from tests.models import tiny_llama


def test_a_bare_group_of_matrices_is_normuon_row_by_row():
    optimizer = NorMuon([nn.Parameter(torch.ones(2, 3))])
    assert optimizer.param_groups[0]["algorithm"] == "normuon"
    assert optimizer.param_groups[0]["layout"] == "o i"


def test_whole_model_is_refused_with_the_remedy():
    with pytest.raises(
        ValueError, match=r"NorMuon needs matrices; .* AdamW group \(plan_parameters does\), or let build_normuon"
    ):
        NorMuon(tiny_llama().parameters())


def test_a_module_in_place_of_parameters_is_told_to_use_build_normuon():
    with pytest.raises(TypeError, match=r"use build_normuon\(LlamaForCausalLM\)"):
        NorMuon(tiny_llama())


def test_names_given_with_the_parameters_are_in_the_message():
    with pytest.raises(ValueError, match=r"'layer.bias' has shape \(3,\)"):
        NorMuon([("layer.weight", nn.Parameter(torch.ones(3, 3))), ("layer.bias", nn.Parameter(torch.ones(3)))])


def test_named_parameters_are_accepted():
    optimizer = NorMuon(nn.Linear(3, 4, bias=False).named_parameters())
    assert optimizer.param_groups[0]["param_names"] == ["weight"]


@pytest.mark.parametrize("shape", [(), (4,), (2, 3, 4), (2, 3, 4, 5)])
def test_anything_but_2d_is_refused_in_a_bare_group(shape):
    with pytest.raises(ValueError, match="NorMuon needs matrices; 'parameter 1 of its group'"):
        NorMuon([nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(shape))])


def test_every_option_has_a_check_and_every_group_key_an_option():
    options = set(inspect.signature(NorMuon).parameters) - {"params"}
    assert {option.removeprefix("adamw_") for option in options} == set(CHECKS)
    taken = {option for keys in GROUP_KEYS.values() for option in keys.values()}
    own = {"nonfinite", "bucket_bytes", "orthogonalize_fn", "replicas", "process_group", "kahan_sum", "compile"}
    assert taken | own == options
    # what a batch may not mix, and what is read block by block or only applied at the end
    apart = {"lr", "weight_decay", "momentum", "nesterov", "ns_dtype", "momentum_dtype"}
    assert set(BATCH_OPTIONS) | apart == set(GROUP_KEYS["normuon"])


def test_flat_shards_of_fsdp1_are_told_to_use_fsdp2():
    flat = nn.Parameter(torch.ones(12))
    flat._fsdp_flattened = True
    with pytest.raises(ValueError, match=r"FSDP1.*use FSDP2"):
        NorMuon([flat])


def test_a_refused_group_leaves_the_optimizer_as_it_was():
    optimizer = NorMuon([nn.Parameter(torch.ones(2, 2))])
    with pytest.raises(ValueError, match="needs matrices"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    with pytest.raises(ValueError, match="beta2"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))], "beta2": 1.0})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("lr", -1.0),
        ("lr", float("nan")),
        ("lr", "0.1"),
        ("lr", torch.ones(2)),
        ("lr", torch.tensor(-1.0)),
        ("weight_decay", -0.1),
        ("momentum", 1.0),
        ("beta2", -0.1),
        ("eps", -1e-8),
        ("ns_steps", 0),
        ("ns_steps", 2.5),
        ("ns_steps", True),
        ("nesterov", 1),
        ("normalize_neurons", "no"),
        ("adjust_lr_fn", "match_rms"),
        ("adjust_lr_fn", None),
        ("ns_coefficients", "polar"),
        ("ns_coefficients", (1.0, 2.0)),
        ("ns_dtype", torch.float16),
        ("ns_dtype", "bf16"),
        ("adamw_lr", -1.0),
        ("adamw_betas", (0.9, 1.0)),
        ("adamw_betas", (0.9,)),
        ("adamw_eps", -1.0),
        ("adamw_weight_decay", -1.0),
        ("nonfinite", "ignore"),
        ("bucket_bytes", 0),
        ("orthogonalize_fn", "muon"),
        ("lr", True),
        ("lr", float("inf")),
        ("ns_coefficients", None),
        ("ns_coefficients", ("a", "b", "c")),
        ("adamw_betas", None),
        ("adamw_betas", 0.9),
    ],
)
def test_values_out_of_range_are_refused_with_name_and_value(option, value):
    with pytest.raises(ValueError, match=option):
        NorMuon([nn.Parameter(torch.ones(2, 2))], **{option: value})


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"algorithm": "sgd"}, "algorithm='sgd' is not known"),
        ({"layout": "rows cols"}, "layout 'rows cols' is not understood"),
        ({"layout": "o=2+2 i"}, "add up to 4"),
        ({"algorithm": "adamw", "layout": "o i"}, "belongs to algorithm='normuon'"),
        ({"algorithm": "adamw", "betas": 0.9}, "betas=0.9"),
        ({"layout": None}, "layout None is not understood"),
        (
            {"algorithm": "adamw", "adamw_lr": 0.1},
            r"does not read \['adamw_lr'\]; the keys of 'adamw' are \['betas', 'eps', 'lr'",
        ),
        ({"bucket_bytes": 5}, r"does not read \['bucket_bytes'\]; the keys of 'normuon'"),
    ],
)
def test_groups_that_contradict_themselves_are_refused(group, message):
    with pytest.raises(ValueError, match=message):
        NorMuon([{"params": [nn.Parameter(torch.ones(3, 3))], **group}])


def test_what_is_no_group_is_refused_as_torch_does():
    optimizer = NorMuon([nn.Parameter(torch.ones(2, 2))])
    with pytest.raises(TypeError, match="must be a dict"):
        optimizer.add_param_group([nn.Parameter(torch.ones(2, 2))])


def test_dtype_and_its_name_are_the_same():
    for ns_dtype in (torch.bfloat16, "bfloat16"):
        assert NorMuon([nn.Parameter(torch.ones(2, 2))], ns_dtype=ns_dtype).param_groups[0]["ns_dtype"] == "bfloat16"


def test_groups_hold_primitives_of_their_own_algorithm_only():
    optimizer = NorMuon(plan_parameters(tiny_llama()).param_groups(), lr=0.1, adamw_lr=0.2)
    for group in optimizer.param_groups:
        values = [value for key, value in group.items() if key not in ("params", "param_names", "betas")]
        assert all(value is None or type(value) in (str, int, float, bool) for value in values)
        assert group["lr"] == (0.1 if group["algorithm"] == "normuon" else 0.2)
        assert ("betas" in group) == (group["algorithm"] == "adamw")
        assert ("momentum" in group) == (group["algorithm"] == "normuon")


def _stepped():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    optimizer = build_normuon(model)
    model(torch.ones(2, 4)).sum().backward()
    return model, optimizer


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda group: group.pop("layout"), r"needs \['layout'\], which it lost \(group normuon_o_i of '0\.weight'\)"),
        (lambda group: group.update(algorithm="adamw"), r"needs \['betas'\], which it lost \(group normuon_o_i"),
        (lambda group: group.pop("algorithm"), r"algorithm=None is not known \(group normuon_o_i"),
    ],
)
def test_a_group_edited_so_that_its_matrices_lost_their_layout_is_refused(edit, message):
    model, optimizer = _stepped()
    before = model[0].weight.detach().clone()
    edit(optimizer.param_groups[0])
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert before.equal(model[0].weight)


def test_a_layout_changed_after_the_first_step_is_refused():
    _, optimizer = _stepped()
    optimizer.step()
    optimizer.param_groups[0]["layout"] = "i o"
    with pytest.raises(ValueError, match=r"'0\.weight' is on normuon with layout 'i o', its state is not"):
        optimizer.step()


def test_a_matrix_moved_to_an_adamw_group_after_the_first_step_is_refused():
    _, optimizer = _stepped()
    optimizer.step()
    optimizer.param_groups[-1]["params"].append(optimizer.param_groups[0]["params"].pop())
    with pytest.raises(ValueError, match="is on adamw, its state is not"):
        optimizer.step()
