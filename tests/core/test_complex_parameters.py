"""Complex parameters beside real ones: AdamW's, bit for bit as torch steps them."""

import copy

import pytest
import torch
from torch import nn

from normuon_plugins import NorMuon, build_normuon, clip_grad_norm_, plan_parameters


class FourierOperator(nn.Module):
    """Complex weights as a raw parameter, as those of a Linear and as a bias, between two real layers."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.lift, self.project = nn.Linear(4, 8), nn.Linear(8, 4)
        self.spectrum = nn.Parameter(torch.randn(5, 3, dtype=torch.cfloat))
        self.turn = nn.Linear(5, 5, dtype=torch.cfloat)
        for layer in (self.lift, self.project):
            layer.to(dtype)

    def forward(self, x):
        modes = torch.fft.rfft(self.lift(x.to(self.lift.weight.dtype)).float(), dim=-1)
        modes = self.turn(modes * self.spectrum.sum(1))
        return self.project(torch.fft.irfft(modes, n=8, dim=-1).to(self.project.weight.dtype))


def backward(model, step):
    model.zero_grad()
    batch = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
    (model(batch) - batch).square().mean().backward()


def test_the_plan_sends_them_to_adamw_and_says_why():
    plan = plan_parameters(FourierOperator(), strict=True)
    assert plan["project.weight"].algorithm == "normuon"
    for name, decay in {"spectrum": True, "turn.weight": True, "turn.bias": False}.items():
        assert (plan[name].algorithm, plan[name].decay) == ("adamw", decay)
        assert plan[name].reason == "complex: AdamW, on real and imaginary parts"
    assert plan_parameters(FourierOperator(), overrides={"spectrum": "adamw"})["spectrum"].reason == "override"
    for target in ("normuon", "o i"):
        with pytest.raises(ValueError, match=f"override of 'turn.weight' to '{target}': torch.complex64 .* 'adamw'"):
            plan_parameters(FourierOperator(), overrides={r"turn\.weight": target})


@pytest.mark.parametrize("kahan_sum", [False, True])
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_a_step_is_the_one_of_torch(kahan_sum, tensor_lr):
    dtype = torch.bfloat16 if kahan_sum else torch.float32
    model = FourierOperator(dtype)
    names = [name for name, parameter in model.named_parameters() if parameter.is_complex()]
    assert len(names) == 3
    twins = {name: nn.Parameter(model.get_parameter(name).detach().clone()) for name in names}
    lr = torch.tensor(0.05) if tensor_lr else 0.05
    ours = build_normuon(
        model, lr=lr, adamw_betas=(0.8, 0.9), adamw_weight_decay=0.1, kahan_sum=kahan_sum, nonfinite="skip"
    )
    decays = [
        {"params": [twins["spectrum"], twins["turn.weight"]], "weight_decay": 0.1},
        {"params": [twins["turn.bias"]], "weight_decay": 0.0},
    ]
    theirs = torch.optim.AdamW(decays, lr=lr, betas=(0.8, 0.9))
    for step in range(4):
        backward(model, step)
        clip_grad_norm_(model.parameters(), 0.1)
        for name, twin in twins.items():
            twin.grad = model.get_parameter(name).grad.clone()
        ours.step()
        theirs.step()
        if step == 1:
            ours.load_state_dict(copy.deepcopy(ours.state_dict()))
    for name, twin in twins.items():
        parameter = model.get_parameter(name)
        assert torch.equal(parameter, twin)
        assert ours.state[parameter].keys() == theirs.state[twin].keys()
        for key, value in theirs.state[twin].items():
            assert ours.state[parameter][key].dtype == value.dtype
            assert torch.equal(ours.state[parameter][key], value)


def test_the_norm_for_clipping_is_the_one_of_torch():
    model = FourierOperator()
    backward(model, 0)
    expected = torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(clip_grad_norm_(model.parameters(), 1e-3), expected)
    clipped = torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(clipped, torch.tensor(1e-3))


def test_a_gradient_that_is_not_finite_in_its_imaginary_part_is_found():
    model = FourierOperator()
    optimizer = build_normuon(model, nonfinite="raise")
    backward(model, 0)
    model.spectrum.grad.imag[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="'spectrum'"):
        optimizer.step()


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_matrices_made_by_hand_are_refused_by_name_and_an_adamw_group_is_not():
    spectrum = nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))
    with pytest.raises(TypeError, match=r"'spectrum' is torch\.complex64\. Put it in a group of algorithm='adamw'"):
        NorMuon([("spectrum", spectrum)])
    NorMuon([{"params": [("spectrum", spectrum)], "algorithm": "adamw"}])
    half = nn.Parameter(torch.ones(2, 2, dtype=torch.complex32), requires_grad=False)
    with pytest.raises(TypeError, match=r"'half' is torch\.complex32"):
        NorMuon([{"params": [("half", half)], "algorithm": "adamw"}])
