"""What a step promises, beyond the mathematics: closures, None gradients, dtypes, schedulers, scalers, failures."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normuon_plugins import NorMuon, build_normuon
from tests.models import max_difference, tiny_llama, token_blocks


def matrix_and_bias(dtype=torch.float32):
    weight = torch.nn.Parameter(torch.randn(6, 4).to(dtype))
    bias = torch.nn.Parameter(torch.randn(6).to(dtype))
    return weight, bias


def groups(weight, bias):
    return [{"params": [("weight", weight)]}, {"params": [("bias", bias)], "algorithm": "adamw"}]


def backward(*parameters, seed=0):
    for index, parameter in enumerate(parameters):
        generator = torch.Generator().manual_seed(100 * seed + index)
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def snapshot(optimizer):
    parameters = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    states = [{k: v.clone() for k, v in state.items()} for state in optimizer.state.values()]
    return parameters, states


def assert_unchanged(optimizer, before):
    parameters, states = snapshot(optimizer)
    assert all(torch.equal(now, then) for now, then in zip(parameters, before[0], strict=True))
    for now, then in zip(states, before[1], strict=True):
        assert now.keys() == then.keys()
        assert all(torch.equal(now[key], then[key]) for key in now)


def test_closure_is_evaluated_first_with_gradients_and_its_loss_returned():
    weight, bias = matrix_and_bias()
    optimizer = NorMuon(groups(weight, bias), lr=0.1)
    before = weight.detach().clone()

    def closure():
        optimizer.zero_grad()
        loss = (weight.sum() + bias.sum()) ** 2
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert loss.requires_grad
    assert not torch.equal(weight, before)


def test_zero_gradient_and_zero_lr_change_nothing_and_create_all_state():
    # torch.distributed.checkpoint creates state by exactly such a step.
    weight, bias = matrix_and_bias()
    optimizer = NorMuon(groups(weight, bias), lr=0.0)
    before = weight.detach().clone(), bias.detach().clone()
    for parameter in (weight, bias):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.equal(weight, before[0])
    assert torch.equal(bias, before[1])
    assert {key: tuple(value.shape) for key, value in optimizer.state[weight].items()} == {
        "momentum_buffer": (6, 4),
        "second_momentum_buffer": (6, 1),
    }
    assert set(optimizer.state[bias]) == {"exp_avg", "exp_avg_sq", "step"}


def test_no_state_before_the_first_step():
    optimizer = NorMuon(groups(*matrix_and_bias()))
    assert len(optimizer.state) == 0
    assert optimizer.state_dict()["state"] == {}


def test_parameter_without_gradient_is_left_alone_but_has_state():
    weight, _bias = matrix_and_bias()
    other = torch.nn.Parameter(torch.randn(3, 3))
    optimizer = NorMuon([weight, other], lr=0.1)
    before = other.detach().clone()
    backward(weight)
    optimizer.step()
    assert torch.equal(other, before)
    assert torch.equal(optimizer.state[other]["momentum_buffer"], torch.zeros(3, 3))


def test_frozen_parameter_has_no_state():
    weight, bias = matrix_and_bias()
    bias.requires_grad_(False)
    optimizer = NorMuon(groups(weight, bias))
    backward(weight)
    optimizer.step()
    assert bias not in optimizer.state


@given(exponent=st.integers(-20, 20))
@settings(max_examples=20, deadline=None)
def test_scaling_the_gradient_does_not_change_the_first_update(exponent):
    results = []
    for scale in (1.0, 2.0**exponent):
        weight = torch.nn.Parameter(torch.ones(4, 6))
        optimizer = NorMuon([weight], lr=0.1, ns_dtype="float32")
        weight.grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)) * scale
        optimizer.step()
        results.append(weight.detach())
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e30])
def test_extreme_gradients_stay_finite(value):
    weight, bias = matrix_and_bias()
    optimizer = NorMuon(groups(weight, bias), lr=0.1)
    weight.grad, bias.grad = torch.full_like(weight, value), torch.zeros_like(bias)
    for _ in range(2):
        optimizer.step()
    assert weight.isfinite().all()


def test_zero_gradients_at_the_first_step_leave_large_matrices_as_they_are():
    """torch's checkpointing takes such a step to create state; weights of more than 400 entries became NaN."""
    weight = torch.nn.Parameter(torch.randn(64, 48))
    before = weight.detach().clone()
    optimizer = NorMuon([weight], lr=0.0)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert torch.equal(weight, before)


def test_an_edited_group_may_hold_the_dtype_itself():
    weight, bias = matrix_and_bias()
    optimizer = NorMuon(groups(weight, bias))
    optimizer.param_groups[0]["ns_dtype"] = torch.float32
    backward(weight, bias)
    optimizer.step()
    assert optimizer.state[weight]["momentum_buffer"].any()


def test_tensor_lr_equals_float_lr():
    results = []
    for lr in (0.05, torch.tensor(0.05)):
        torch.manual_seed(0)
        weight, bias = matrix_and_bias()
        optimizer = NorMuon(groups(weight, bias), lr=lr)
        for step in range(3):
            backward(weight, bias, seed=step)
            optimizer.step()
        results.append({"weight": weight, "bias": bias})
    assert max_difference(*results) < 1e-6


@pytest.mark.parametrize(
    "make",
    [
        lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5),
        lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10),
        lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=5),
    ],
)
def test_schedulers_move_both_kinds_of_groups(make):
    weight, bias = matrix_and_bias()
    optimizer = NorMuon(groups(weight, bias), lr=0.1, adamw_lr=0.01)
    scheduler = make(optimizer)
    rates = []
    for step in range(4):
        backward(weight, bias, seed=step)
        optimizer.step()
        scheduler.step()
        rates.append([group["lr"] for group in optimizer.param_groups])
    assert len({rate for rate, _ in rates}) == 4
    assert len({rate for _, rate in rates}) == 4


def test_add_param_group_trains_the_new_parameters_with_the_options_of_init():
    weight, bias = matrix_and_bias()
    optimizer = NorMuon([weight], lr=0.1, momentum=0.5, adamw_betas=(0.7, 0.8))
    optimizer.add_param_group({"params": [bias], "algorithm": "adamw", "custom": 1})
    assert optimizer.param_groups[0]["momentum"] == 0.5
    assert optimizer.param_groups[1]["betas"] == (0.7, 0.8)
    assert optimizer.param_groups[1]["custom"] == 1
    assert "momentum" not in optimizer.param_groups[1]
    before = bias.detach().clone()
    backward(weight, bias)
    optimizer.step()
    assert not torch.equal(bias, before)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_copies_continue_alike(clone):
    model = tiny_llama()
    optimizer = build_normuon(model, lr=0.01, nesterov=True, adamw_lr=0.003)
    train(model, optimizer, 2)
    model_copy, optimizer_copy = clone((model, optimizer))
    train(model, optimizer, 2)
    train(model_copy, optimizer_copy, 2)
    assert max_difference(model, model_copy) == 0
    optimizer_copy.add_param_group({"params": [("late", torch.nn.Parameter(torch.randn(2, 2)))]})
    assert optimizer_copy.param_groups[-1].keys() == optimizer.param_groups[0].keys() - {"name"}


def train(model, optimizer, steps):
    batch = torch.utils.data.default_collate(token_blocks(4))
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()


def test_trains_and_gradients_are_never_written():
    model = tiny_llama()
    optimizer = build_normuon(model, lr=0.01)
    batch = torch.utils.data.default_collate(token_blocks(4))
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        before = [parameter.grad.clone() for parameter in model.parameters()]
        optimizer.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_gradient_scaler_skips_a_step_with_inf_and_then_goes_on():
    weight, bias = matrix_and_bias()
    optimizer = NorMuon(groups(weight, bias), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = weight.detach().clone()
    scaler.scale(weight.sum() * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(weight, before)
    optimizer.zero_grad()
    scaler.scale((weight**2).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(weight, before)


# Relative to the distance moved in float64, over three steps: each step rounds the parameter once or twice.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 0.05), (torch.bfloat16, 0.3)])
def test_other_parameter_dtypes_follow_float64(dtype, tolerance):
    moved = {}
    for kind in (torch.float64, dtype):
        weight, bias = (torch.nn.Parameter(torch.ones(shape, dtype=kind)) for shape in ((6, 4), (6,)))
        optimizer = NorMuon(groups(weight, bias), lr=0.5, ns_dtype="float32")
        for step in range(3):
            backward(weight, bias, seed=step)
            optimizer.step()
        moved[kind] = (weight.detach() - 1).double()
        assert optimizer.state[weight]["momentum_buffer"].dtype == kind
        assert optimizer.state[weight]["second_momentum_buffer"].dtype == torch.float32
    assert (moved[dtype] - moved[torch.float64]).norm() < tolerance * moved[torch.float64].norm()


@pytest.mark.parametrize("nesterov", [False, True])
def test_gradients_may_have_another_dtype_than_their_parameter(nesterov):
    results = []
    for grad_dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        weight, bias = matrix_and_bias(torch.bfloat16)
        optimizer = NorMuon(groups(weight, bias), lr=0.1, nesterov=nesterov)
        for index, parameter in enumerate((weight, bias)):
            parameter.grad_dtype = grad_dtype
            gradient = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
            parameter.grad = gradient.bfloat16().to(grad_dtype)
        optimizer.step()
        results.append(weight.detach().clone())
    assert torch.equal(*results)


def test_nonfinite_propagates_by_default():
    weight, bias = matrix_and_bias()
    optimizer = NorMuon(groups(weight, bias))
    backward(weight, bias)
    weight.grad[0, 0] = float("nan")
    optimizer.step()
    assert weight.isnan().any()


def test_nonfinite_skip_leaves_that_parameter_and_counts():
    weight, bias = matrix_and_bias()
    optimizer = NorMuon(groups(weight, bias), nonfinite="skip", lr=0.1)
    backward(weight, bias)
    optimizer.step()
    state = {key: value.clone() for key, value in optimizer.state[weight].items()}
    before = weight.detach().clone(), bias.detach().clone()
    weight.grad[0, 0] = float("inf")
    optimizer.step()
    assert torch.equal(weight, before[0])
    assert all(torch.equal(optimizer.state[weight][key], state[key]) for key in state)
    assert not torch.equal(bias, before[1])
    assert optimizer.skipped_steps == copy.deepcopy(optimizer).skipped_steps == 1


def spoil_gradient_with_nan(optimizer, weight, bias):
    optimizer.defaults["nonfinite"] = "raise"
    bias.grad[0] = float("nan")


def spoil_gradient_with_sparsity(optimizer, weight, bias):
    bias.grad = torch.randn(6).to_sparse()


def edit(key, value, group=0):
    def spoil(optimizer, weight, bias):
        optimizer.param_groups[group][key] = value

    return spoil


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (spoil_gradient_with_nan, FloatingPointError, r"NaN or infinity in \['bias'\]"),
        (spoil_gradient_with_sparsity, ValueError, "'bias' has a sparse gradient"),
        (edit("layout", "o i i"), ValueError, r"'weight' has shape \(6, 4\).*describes 3 dimensions"),
        (edit("layout", None), ValueError, "layout None is not understood"),
        (edit("algorithm", "sgd"), ValueError, "algorithm='sgd' is not known"),
        (edit("lr", None), ValueError, "lr=None"),
        (edit("lr", -1.0), ValueError, "lr=-1.0"),
        (edit("weight_decay", float("inf")), ValueError, "weight_decay=inf"),
        (edit("momentum", 1.0), ValueError, "momentum=1.0"),
        (edit("nesterov", "yes"), ValueError, "nesterov='yes'"),
        (edit("ns_coefficients", "quick"), ValueError, "ns_coefficients='quick'"),
        (edit("ns_steps", "5"), ValueError, "ns_steps='5'"),
        (edit("eps", None), ValueError, "eps=None"),
        (edit("adjust_lr_fn", "rms"), ValueError, "adjust_lr_fn='rms'"),
        (edit("beta2", 2.0), ValueError, "beta2=2.0"),
        (edit("normalize_neurons", None), ValueError, "normalize_neurons=None"),
        (edit("ns_dtype", "float8"), ValueError, "ns_dtype='float8'"),
        (edit("betas", (0.9, 1.0), group=1), ValueError, r"betas=\(0.9, 1.0\)"),
        (edit("layout", "o i", group=1), ValueError, "belongs to algorithm='normuon'"),
    ],
)
def test_a_step_that_cannot_be_taken_is_refused_before_any_write(spoil, error, message):
    weight, bias = matrix_and_bias()
    optimizer = NorMuon(groups(weight, bias), lr=0.1)
    backward(weight, bias)
    optimizer.step()
    before = snapshot(optimizer)
    spoil(optimizer, weight, bias)
    with pytest.raises(error, match=message):
        optimizer.step()
    assert_unchanged(optimizer, before)


@pytest.mark.parametrize("wrong", [lambda x: x[0], lambda x: x.double()])
def test_an_orthogonalizer_that_changes_shape_or_dtype_is_named(wrong):
    weight, _ = matrix_and_bias()
    optimizer = NorMuon([weight], orthogonalize_fn=wrong, ns_dtype="float32")
    backward(weight)
    with pytest.raises(ValueError, match="orthogonalize_fn must return a tensor like its input"):
        optimizer.step()


def in_memory_as(kind, values):
    """Return ``values``, a contiguous matrix, in another memory layout; ``expanded`` repeats its first row."""
    rows, cols = values.shape
    if kind == "transposed":
        return values.T.contiguous().T
    if kind == "sliced":
        return torch.cat([values, torch.full((rows, 2), 7.0)], dim=1)[:, :cols]
    if kind == "expanded":
        return values[:1].expand(rows, cols)
    return values


@pytest.mark.parametrize("algorithm", ["normuon", "adamw"])
@pytest.mark.parametrize("parameter_kind", ["contiguous", "transposed", "sliced"])
@pytest.mark.parametrize("gradient_kind", ["contiguous", "transposed", "sliced", "expanded"])
def test_memory_layout_does_not_matter(algorithm, parameter_kind, gradient_kind):
    """torch's fused AdamW on CPU updated the wrong elements, and memory outside a sliced parameter."""
    generator = torch.Generator().manual_seed(0)
    initial = torch.randn(4, 6, generator=generator)
    gradients = [in_memory_as(gradient_kind, torch.randn(4, 6, generator=generator)) for _ in range(3)]
    strange, plain = (
        torch.nn.Parameter(in_memory_as(kind, initial.clone())) for kind in (parameter_kind, "contiguous")
    )
    for weight in (strange, plain):
        optimizer = NorMuon([{"params": [weight], "algorithm": algorithm}], lr=0.1, ns_dtype="float32")
        for gradient in gradients:
            weight.grad = gradient if weight is strange else gradient.clone(memory_format=torch.contiguous_format)
            optimizer.step()
    torch.testing.assert_close(strange, plain, rtol=1e-5, atol=1e-6)
    if parameter_kind == "sliced":
        memory = strange.detach().as_strided((4, 8), (8, 1))
        assert torch.equal(memory[:, 6:], torch.full((4, 2), 7.0))


def test_a_model_cast_after_the_first_step_is_refused_before_any_write():
    weight, bias = matrix_and_bias()
    optimizer = NorMuon(groups(weight, bias), lr=0.1)
    backward(weight, bias)
    optimizer.step()
    bias.data = bias.data.double()
    bias.grad = torch.ones(6, dtype=torch.float64)
    before = weight.detach().clone()
    with pytest.raises(ValueError, match=r"'bias' is \(6,\) torch.float64 on cpu, its state \(6,\) torch.float32"):
        optimizer.step()
    assert torch.equal(weight, before)


def test_replaced_parameters_are_found_at_the_next_step():
    # Accelerate's FSDP2 replaces the entries of a group after the optimizer was built.
    weight, bias = matrix_and_bias()
    optimizer = NorMuon(groups(weight, bias), lr=0.1)
    new = torch.nn.Parameter(weight.detach().clone())
    optimizer.param_groups[0]["params"][0] = new
    backward(new, bias)
    optimizer.step()
    assert not torch.equal(new, weight)
    assert new in optimizer.state


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's own, 2.13
@pytest.mark.parametrize("rule", ["match_rms_adamw", "match_progress_adamw"])
def test_compiled_steps_give_the_same_weights(rule):
    """Once: compiling takes seconds. float32 products, so that only the order of sums may differ."""
    weights = [torch.nn.Parameter(torch.randn(2, 24, 40)[index].clone()) for index in (0, 1)]
    twins = [torch.nn.Parameter(weight.detach().clone()) for weight in weights]
    compiled = NorMuon(weights, lr=0.1, compile=True, ns_dtype="float32", adjust_lr_fn=rule)
    eager = NorMuon(twins, lr=0.1, ns_dtype="float32", adjust_lr_fn=rule)
    for _ in range(3):
        for weight, twin in zip(weights, twins, strict=True):
            weight.grad = torch.randn_like(weight)
            twin.grad = weight.grad.clone()
        compiled.step()
        eager.step()
    for weight, twin in zip(weights, twins, strict=True):
        torch.testing.assert_close(weight, twin, rtol=1e-5, atol=1e-6)
