"""The numbers of NorMuon.metrics, against the same numbers computed from the weights and from the paper."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from normuon_plugins import NorMuon, build_normuon
from tests.models import tiny_llama, token_blocks

NEURONS = {f"normuon/{key}" for key in ("update_rms", "neuron_lr_min", "neuron_lr_mean", "neuron_lr_max")}
NEURONS |= {"normuon/neuron_spread_before", "normuon/neuron_spread_after"}


def stepped(weight, **options):
    """Return an optimizer after one step on a matrix, and the momentum that step orthogonalized."""
    torch.manual_seed(0)
    weight.grad = torch.randn_like(weight)
    optimizer = NorMuon([("weight", weight)], ns_dtype="float32", **{"lr": 0.5, "weight_decay": 0.0, **options})
    optimizer.step()
    return optimizer


def test_before_the_first_step_there_are_rates_and_the_share():
    model = tiny_llama()
    found = build_normuon(model, lr=0.1, adamw_lr=0.02).metrics()
    matrices = sum(p.numel() for name, p in model.named_parameters() if "_proj" in name)
    share = matrices / sum(p.numel() for p in model.parameters())
    assert found == {"normuon/lr": 0.1, "adamw/lr": 0.02, "normuon/share": share, "normuon/skipped": 0}


def test_update_rms_is_that_of_the_change_of_the_weights():
    weight = nn.Parameter(torch.zeros(6, 10))
    optimizer = stepped(weight, adjust_lr_fn="original")
    rms = (weight.detach() / 0.5).square().mean().sqrt()
    torch.testing.assert_close(optimizer.metrics()["normuon/update_rms"], rms)


@pytest.mark.parametrize("normalize", [True, False])
def test_neuron_numbers_are_those_of_the_change_against_plain_orthogonalization(normalize):
    orthogonalized = {}

    def remember(update):
        orthogonalized["update"] = nn.functional.normalize(update, dim=(-2, -1))
        return orthogonalized["update"].clone()

    weight = nn.Parameter(torch.zeros(6, 10))
    found = stepped(weight, orthogonalize_fn=remember, normalize_neurons=normalize).metrics(synchronize=True)
    before, after = orthogonalized["update"][0].norm(dim=1), weight.detach().norm(dim=1)
    rates = after / before
    expected = {
        "normuon/update_rms": 0.2,
        "normuon/neuron_lr_min": rates.min().item(),
        "normuon/neuron_lr_mean": rates.mean().item(),
        "normuon/neuron_lr_max": rates.max().item(),
        "normuon/neuron_spread_before": (before.std(correction=0) / before.mean()).item(),
        "normuon/neuron_spread_after": (after.std(correction=0) / after.mean()).item(),
    }
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("normalize", [True, False])
def test_a_neuron_without_an_update_has_no_rate(normalize):
    """Its row was multiplied by one over nothing, and the mean and the largest rate were 1e35."""
    weights = [nn.Parameter(torch.zeros(4, 6)) for _ in range(2)]
    weights[0].grad = torch.randn(4, 6)
    weights[0].grad[1] = 0
    weights[1].grad = torch.zeros(4, 6)
    optimizer = NorMuon(weights, lr=0.01, normalize_neurons=normalize, ns_dtype="float32")
    optimizer.step()
    found = optimizer.metrics(synchronize=True)
    assert found["normuon/neuron_lr_min"] == 0
    assert 0 < found["normuon/neuron_lr_mean"] < found["normuon/neuron_lr_max"] < 0.1


@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_rates_of_groups_that_share_a_batch_are_those_of_each_group(kind):
    """A batch was counted with the rate of its first matrix."""
    gradients = torch.randn(3, 6, 10, generator=torch.Generator().manual_seed(0))
    groups, alone = [], []
    for gradient, lr in zip(gradients, (1e-2, 1e-4, 0.0), strict=True):
        for optimizers in (groups, alone):
            weight = nn.Parameter(torch.zeros(6, 10))
            weight.grad = gradient.clone()
            optimizers.append({"params": [weight], "lr": kind(lr)})
    found = stepped_groups(groups)
    numbers = [stepped_groups([group]) for group in alone]
    for name, join in (("min", min), ("max", max), ("mean", lambda values: sum(values) / 3)):
        key = f"normuon/neuron_lr_{name}"
        assert found[key] == pytest.approx(join([each[key] for each in numbers]), rel=1e-5)


def stepped_groups(groups):
    optimizer = NorMuon(groups, ns_dtype="float32", adjust_lr_fn="match_rms_adamw")
    optimizer.step()
    return optimizer.metrics(synchronize=True)


def test_the_neuron_step_makes_neurons_equal():
    found = stepped(nn.Parameter(torch.zeros(6, 10))).metrics()
    assert found["normuon/neuron_spread_before"] > 0.05
    assert found["normuon/neuron_spread_after"] < 1e-6


@pytest.mark.parametrize("lr", [0.5, torch.tensor(0.5)])
def test_rates_are_those_of_the_step_though_a_scheduler_moved_on(lr):
    weight = nn.Parameter(torch.zeros(6, 10))
    optimizer = stepped(weight, lr=lr)
    before = optimizer.metrics(synchronize=True)
    if isinstance(lr, torch.Tensor):
        optimizer.param_groups[0]["lr"].zero_()
    else:
        optimizer.param_groups[0]["lr"] = 0.0
    assert before["normuon/lr"] == 0.5
    assert optimizer.metrics(synchronize=True) == before


def test_without_synchronization_numbers_of_neurons_stay_on_their_device():
    found = stepped(nn.Parameter(torch.zeros(6, 10)), lr=torch.tensor(0.5)).metrics()
    assert {key for key, value in found.items() if isinstance(value, torch.Tensor)} == {"normuon/lr", *NEURONS}


class Operations(TorchDispatchMode):
    """Remembers what torch was asked for: Python reads by ``_local_scalar_dense``, devices change by ``_to_copy``."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.__name__.split(".")[0])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("synchronize", [False, True])
def test_only_synchronization_reads_a_value_from_the_device(synchronize):
    optimizer = stepped(nn.Parameter(torch.zeros(6, 10)))
    with Operations() as seen:
        optimizer.metrics(synchronize=synchronize)
    assert {"sum", "stack"} <= seen.names
    assert bool(seen.names & {"_local_scalar_dense", "_to_copy", "lift_fresh"}) is synchronize


def test_synchronized_numbers_are_floats_also_for_a_tensor_rate():
    found = stepped(nn.Parameter(torch.zeros(6, 10)), lr=torch.tensor(0.5)).metrics(synchronize=True)
    assert {type(value) for value in found.values()} == {float}


def test_skipped_updates_are_counted_and_their_neurons_are_not():
    weight = nn.Parameter(torch.zeros(2, 2))
    weight.grad = torch.full((2, 2), torch.inf)
    optimizer = NorMuon([weight], nonfinite="skip")
    optimizer.step()
    assert optimizer.metrics(synchronize=True) == {"normuon/lr": 1e-3, "normuon/share": 1.0, "normuon/skipped": 1.0}


def test_numbers_of_a_step_do_not_travel_with_a_copy():
    optimizer = stepped(nn.Parameter(torch.zeros(6, 10)))
    copied = copy.deepcopy(optimizer)
    assert optimizer.metrics().keys() >= NEURONS
    assert not NEURONS & copied.metrics().keys()


def test_loading_keeps_the_count_of_skipped_updates():
    weight = nn.Parameter(torch.zeros(2, 2))
    weight.grad = torch.full((2, 2), torch.inf)
    optimizer = NorMuon([weight], nonfinite="skip")
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.skipped_steps == 1


def test_all_matrices_of_a_model_count():
    model = tiny_llama()
    optimizer = build_normuon(model, lr=0.1, ns_dtype="float32", weight_decay=0.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "_proj" in name}
    model(**{key: value[None] for key, value in token_blocks(1)[0].items()}).loss.backward()
    optimizer.step()
    moved = torch.cat([(p.detach() - before[name]).flatten() for name, p in model.named_parameters() if name in before])
    assert optimizer.metrics(synchronize=True)["normuon/update_rms"] == pytest.approx(
        (moved / 0.1).square().mean().sqrt().item(), rel=1e-4
    )
