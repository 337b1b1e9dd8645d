"""Momentum stored in fewer bits: what it costs, what is computed with, and how it is saved and changed."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from normuon_plugins import NorMuon, build_normuon
from tests.models import max_difference, tiny_llama, token_blocks

BLOCK = 256
# why -> layout, shape; rows are shorter than a block, longer, and whole blocks
SHAPES = {
    "shorter than a block": ("o i", (5, 7)),
    "a block and a rest": ("o i", (6, 300)),
    "whole blocks": ("o i", (4, 512)),
    "convolution": ("o i i", (4, 40, 9)),
    "transposed convolution": ("i o i", (3, 60, 5)),
    "transposed": ("i o", (8, 257)),
    "experts": ("e o i", (2, 3, 260)),
    "transposed experts": ("e i o=200+100", (2, 5, 300)),
    "fused": ("o=4+2+2 i", (8, 270)),
    "interleaved": ("o%2+1 i", (6, 270)),
}
OPTIONS = {"lr": 0.1, "weight_decay": 0.1, "ns_dtype": "float32"}


def matrix(layout, shape, dtype=torch.float32, **options):
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
    group = {"params": [("weight", weight)], "layout": layout}
    return weight, NorMuon([group], **{**OPTIONS, **options})


def gradient(shape, step, dtype=torch.float32):
    generator = torch.Generator().manual_seed(100 + step)
    scales = torch.logspace(-2, 2, shape[-1])  # within a row, and so from block to block
    return (torch.randn(shape, generator=generator) * scales).to(dtype)


def steps(weight, optimizer, first, last):
    for step in range(first, last):
        weight.grad = gradient(weight.shape, step, weight.dtype)
        optimizer.step()


def rows(layout, tensor):
    """Return a tensor as a list of rows of memory: what comes after the first dimension that is not of experts."""
    leading = 1 + next(dim for dim, axis in enumerate(layout.split()) if axis[0] != "e")
    return tensor.reshape(math.prod(tensor.shape[:leading]), -1)


def read(layout, state):
    """Return int8 momentum in float64, block by block."""
    codes, scales = rows(layout, state["momentum_buffer"]).double(), rows(layout, state["momentum_scale"]).double()
    for row in range(codes.shape[0]):
        for block in range(scales.shape[1]):
            codes[row, block * BLOCK : (block + 1) * BLOCK] *= scales[row, block]
    return codes.reshape(state["momentum_buffer"].shape)


def nbytes(optimizer):
    return sum(tensor.nbytes for state in optimizer.state.values() for tensor in state.values())


def gpt2_like_state(make):
    weights = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((768, 768), (768, 3072))]
    optimizer = make(weights)
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    return nbytes(optimizer)


@pytest.mark.parametrize(("dtype", "share"), [(None, 0.51), ("bfloat16", 0.26), ("int8", 0.14)])
def test_state_is_this_share_of_adamws(dtype, share):
    ours = gpt2_like_state(
        lambda weights: NorMuon(weights, momentum_dtype=dtype, orthogonalize_fn=torch.clone, ns_dtype="float32")
    )
    assert ours <= share * gpt2_like_state(torch.optim.AdamW)


@pytest.mark.parametrize(("layout", "shape"), SHAPES.values(), ids=SHAPES)
def test_int8_holds_every_block_of_a_row_to_half_a_step_of_its_largest_number(layout, shape):
    weight, optimizer = matrix(layout, shape, momentum_dtype="int8")
    steps(weight, optimizer, 0, 1)
    state = optimizer.state[weight]
    momentum = rows(layout, 0.05 * weight.grad.double())
    found = rows(layout, read(layout, state))
    scales = rows(layout, state["momentum_scale"]).double()
    assert state["momentum_buffer"].dtype == torch.int8
    assert scales.shape[1] == -(-momentum.shape[1] // BLOCK)
    for block in range(scales.shape[1]):
        span = slice(block * BLOCK, (block + 1) * BLOCK)
        largest = momentum[:, span].abs().amax(dim=1)
        torch.testing.assert_close(scales[:, block], largest / 127, rtol=1e-6, atol=0)
        assert ((found - momentum)[:, span].abs().amax(dim=1) <= largest / 254 * 1.00001).all()


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize(("layout", "shape"), SHAPES.values(), ids=SHAPES)
def test_what_is_orthogonalized_is_not_rounded_to_be_stored(layout, shape, dtype, nesterov):
    """The first step begins at zero, so that nothing has been rounded yet: it is that of float32, bit by bit."""
    options = {"nesterov": nesterov, "bucket_bytes": 3000}
    weight, optimizer = matrix(layout, shape, momentum_dtype=dtype, **options)
    expected, plain = matrix(layout, shape, **options)
    steps(weight, optimizer, 0, 1)
    steps(expected, plain, 0, 1)
    assert torch.equal(weight, expected)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("layout", "shape"), SHAPES.values(), ids=SHAPES)
def test_int8_is_read_to_float32_and_advanced_there(layout, shape, parameters, nesterov):
    seen = []

    def orthogonalize(update):
        seen.append(update.double().square().sum())
        return update.clone()

    options = {"orthogonalize_fn": orthogonalize, "nesterov": nesterov, "momentum_dtype": "int8"}
    weight, optimizer = matrix(layout, shape, parameters, **options)
    steps(weight, optimizer, 0, 3)
    before = read(layout, optimizer.state[weight])
    seen.clear()
    steps(weight, optimizer, 3, 4)
    momentum = 0.95 * before + 0.05 * weight.grad.double()
    update = 0.95 * momentum + 0.05 * weight.grad.double() if nesterov else momentum
    torch.testing.assert_close(sum(seen), update.square().sum(), rtol=1e-6, atol=0)
    found, scales = read(layout, optimizer.state[weight]), rows(layout, optimizer.state[weight]["momentum_scale"])
    error = rows(layout, found - momentum).abs().amax(dim=1)
    assert (error <= 0.5001 * scales.double().amax(dim=1)).all()


def test_float32_momentum_of_bfloat16_parameters_is_that_of_float32():
    weight, optimizer = matrix("o i", (6, 9), torch.bfloat16, momentum_dtype="float32")
    expected = torch.zeros(6, 9)
    for step in range(4):
        steps(weight, optimizer, step, step + 1)
        expected = 0.95 * expected + 0.05 * weight.grad.float()
    torch.testing.assert_close(optimizer.state[weight]["momentum_buffer"], expected)


@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_saved_run_goes_on_bit_by_bit(dtype, parameters):
    def run(seed):
        model = tiny_llama(seed).to(parameters)
        return model, build_normuon(model, lr=0.01, momentum_dtype=dtype, kahan_sum=True)

    def train(model, optimizer, first, last):
        for step in range(first, last):
            optimizer.zero_grad()
            model(**torch.utils.data.default_collate(token_blocks(4, seed=step))).loss.backward()
            optimizer.step()

    model, optimizer = run(0)
    train(model, optimizer, 0, 3)
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    copied = copy.deepcopy((model, optimizer))
    pickled = pickle.loads(pickle.dumps((model, optimizer)))
    train(model, optimizer, 3, 5)

    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    loaded = run(5)
    loaded[0].load_state_dict(weights)
    loaded[1].load_state_dict(state)
    for resumed in (loaded, copied, pickled):
        train(*resumed, 3, 5)
        assert max_difference(resumed[0], model) == 0
        for parameter, other in zip(model.parameters(), resumed[0].parameters(), strict=True):
            found = resumed[1].state[other]
            for key, value in optimizer.state[parameter].items():
                assert found[key].dtype == value.dtype
                assert torch.equal(found[key], value)


@pytest.mark.parametrize("after", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("before", [None, "bfloat16", "int8"])
def test_momentum_written_to_the_group_is_stored_anew_at_the_next_step(before, after):
    weight, optimizer = matrix("o i", (6, 300), momentum_dtype=before)
    steps(weight, optimizer, 0, 3)
    exact = read("o i", optimizer.state[weight]) if before == "int8" else optimizer.state[weight]["momentum_buffer"]
    optimizer.param_groups[0]["momentum_dtype"] = after
    weight.grad = None
    optimizer.step()  # without a gradient the momentum itself stays
    state = optimizer.state[weight]
    assert state["momentum_buffer"].dtype == getattr(torch, after)
    found = read("o i", state) if after == "int8" else state["momentum_buffer"].double()
    limit = {"float32": 1e-6, "bfloat16": 2**-8, "int8": 1 / 250}[after]
    error = (found - exact).abs().amax(dim=1) / exact.abs().amax(dim=1)
    assert (error <= limit).all()
    assert ("momentum_scale" in state) is (after == "int8")


def test_a_checkpoint_from_before_the_option_is_stored_anew():
    weight, optimizer = matrix("o i", (6, 300))
    steps(weight, optimizer, 0, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["param_groups"][0]["momentum_dtype"]
    other, loaded = matrix("o i", (6, 300), momentum_dtype="int8")
    loaded.load_state_dict(saved)
    loaded.step()
    expected = optimizer.state[weight]["momentum_buffer"]
    error = (read("o i", loaded.state[other]) - expected).abs().amax()
    assert 0 < error <= expected.abs().amax() / 250


def test_the_checkpoint_says_how_momentum_is_stored():
    weight, optimizer = matrix("o i", (6, 300), momentum_dtype="int8")
    steps(weight, optimizer, 0, 3)
    other, loaded = matrix("o i", (6, 300))
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert loaded.param_groups[0]["momentum_dtype"] == "int8"
    assert loaded.state[other]["momentum_buffer"].dtype == torch.int8


def test_int8_momentum_that_lost_its_scales_is_refused_by_name():
    weight, optimizer = matrix("o i", (6, 300), momentum_dtype="int8")
    steps(weight, optimizer, 0, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["state"][0]["momentum_scale"]
    saved["state"][0]["momentum_buffer"] = saved["state"][0]["momentum_buffer"].float()
    with pytest.raises(
        ValueError, match="'weight': the checkpoint was written with momentum_dtype='int8' and read with"
    ):
        matrix("o i", (6, 300))[1].load_state_dict(saved)


def test_a_full_checkpoint_of_float32_read_into_int8_is_refused_by_name():
    """torch.distributed.checkpoint fills the keys that the file lacks from the optimizer that asks."""
    weight, optimizer = matrix("o i", (6, 300))
    steps(weight, optimizer, 0, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["momentum_scale"] = torch.zeros(6, 2)
    with pytest.raises(
        ValueError, match="'weight': the checkpoint was written with momentum_dtype=None and read into int8"
    ):
        matrix("o i", (6, 300), momentum_dtype="int8")[1].load_state_dict(saved)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_what_is_not_finite_propagates(dtype, bad):
    weight, optimizer = matrix("o i", (4, 300), momentum_dtype=dtype)
    steps(weight, optimizer, 0, 1)
    weight.grad[1, 2] = bad
    optimizer.step()
    assert weight.isnan().any()
    steps(weight, optimizer, 1, 2)
    assert weight.isnan().all()  # momentum remembers it, as in float32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_zero_gradients_at_rate_zero_leave_the_weights_and_create_the_state(dtype):
    weight, optimizer = matrix("o i", (4, 300), momentum_dtype=dtype, lr=0.0)
    before = weight.detach().clone()
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert torch.equal(weight, before)
    assert not optimizer.state[weight]["momentum_buffer"].any()
    steps(weight, optimizer, 0, 1)
    assert optimizer.state[weight]["momentum_buffer"].any()


def test_blocks_of_zeros_and_of_tiny_numbers_stay_finite():
    weight, optimizer = matrix("o i", (4, 600), momentum_dtype="int8")
    weight.grad = torch.zeros(4, 600)
    weight.grad[1, :300] = 1e-42
    weight.grad[2, :300] = 1e-30
    for _ in range(3):
        optimizer.step()
    assert weight.isfinite().all()
    assert read("o i", optimizer.state[weight])[2, 0] > 0


def test_skipped_and_absent_gradients_leave_int8_momentum_as_it_was():
    weight, optimizer = matrix("o i", (4, 300), momentum_dtype="int8", nonfinite="skip")
    steps(weight, optimizer, 0, 2)
    before = copy.deepcopy(optimizer.state[weight])
    weight.grad = torch.full((4, 300), math.nan)
    optimizer.step()
    weight.grad = None
    optimizer.step()
    assert all(torch.equal(optimizer.state[weight][key], value) for key, value in before.items())


def test_a_dtype_is_kept_by_name():
    assert matrix("o i", (3, 3), momentum_dtype=torch.int8)[1].param_groups[0]["momentum_dtype"] == "int8"


def test_an_unknown_dtype_is_refused_with_those_that_are_known():
    with pytest.raises(ValueError, match=r"momentum_dtype='int4' must be one of \('float32', 'bfloat16', 'int8'\)"):
        matrix("o i", (3, 3), momentum_dtype="int4")


class Largest(TorchDispatchMode):
    """Remember the size of the largest float32 tensor that any operation returned."""

    nbytes = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float32:
            self.nbytes = max(self.nbytes, result.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize(("parameters", "dtype"), [(torch.bfloat16, "int8"), (torch.float16, "bfloat16")])
def test_float32_copies_are_of_one_matrix_and_not_of_all_experts(parameters, dtype):
    options = {"momentum_dtype": dtype, "bucket_bytes": 1, "orthogonalize_fn": torch.clone}
    weight, optimizer = matrix("e o i", (16, 1024, 512), parameters, **options)
    steps(weight, optimizer, 0, 1)
    with Largest() as largest:
        optimizer.step()
    assert largest.nbytes == 2**20 * 4  # two matrices of 1024 x 512
