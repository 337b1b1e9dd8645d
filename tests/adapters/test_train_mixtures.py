"""Tiny mixtures of experts through the Hugging Face Trainer, each against its unfused re-statement.

The re-statement holds nothing but Linears, one per expert and role, whose rows are neurons beyond doubt. That both end
with the same weights verifies the axis of the neurons, and the blocks, of every stacked weight.
"""

import statistics
from collections.abc import Mapping
from typing import NamedTuple

import pytest
import torch
from torch import nn
from transformers import Trainer

from normuon_plugins import plan_parameters
from normuon_plugins.hf_trainer import register_normuon, unregister_normuon
from tests.adapters.training import GLOBAL_BATCH, trainer_arguments, weights
from tests.models import max_difference, token_blocks
from tests.unfused import MIXTURES, plain_groups

EPOCHS = 3
STEPS_PER_EPOCH = 3
CLIP = 0.5
# by the last parts of the names of the routers, as the models call them
ROUTERS = {
    "Mixtral": ("gate.weight",),
    "gpt-oss": ("router.weight", "router.bias"),
    "Llama 4": ("router.weight",),
    "DeepSeek-V3": ("gate.weight",),
}


class Run(NamedTuple):
    """A mixture trained twice.

    Attributes:
        name: In ``MIXTURES``.
        initial: Name -> weight of the fused model before training.
        fused: After training.
        unfused: After training; from the same weights.
        logs: What the Trainer logged of the fused model, a dict per step.
    """

    name: str
    initial: Mapping[str, torch.Tensor]
    fused: nn.Module
    unfused: nn.Module
    logs: list[dict]


def train(model, folder):
    arguments = trainer_arguments(
        folder, max_steps=EPOCHS * STEPS_PER_EPOCH, learning_rate=0.03, max_grad_norm=CLIP, remove_unused_columns=False
    )
    data = token_blocks(STEPS_PER_EPOCH * GLOBAL_BATCH)
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture(scope="module", params=MIXTURES)
def run(request, tmp_path_factory):
    case = MIXTURES[request.param]
    register_normuon()
    fused = case.build()
    initial, unfused = weights(fused), case.unfuse(fused)
    logs = train(fused, tmp_path_factory.mktemp("fused"))
    train(unfused, tmp_path_factory.mktemp("unfused"))
    unregister_normuon()
    return Run(request.param, initial, fused, unfused, logs)


def test_ends_like_its_unfused_restatement(run):
    assert max_difference(MIXTURES[run.name].unfuse(run.fused), run.unfused) < 1e-6


def test_every_weight_moves(run):
    for name, parameter in run.fused.named_parameters():
        assert not torch.equal(parameter, run.initial[name]), name


def test_the_loss_falls(run):
    losses = [entry["loss"] for entry in run.logs]
    assert len(losses) == EPOCHS * STEPS_PER_EPOCH
    assert statistics.mean(losses[-STEPS_PER_EPOCH:]) < statistics.mean(losses[:STEPS_PER_EPOCH]) - 0.1


def test_gradients_were_clipped(run):
    # otherwise the comparison would not show that both clip by the same norm
    assert min(entry["grad_norm"] for entry in run.logs) > CLIP


def test_routers_are_on_adamw(run):
    routers = [row for row in plan_parameters(run.fused) if row.name.endswith(ROUTERS[run.name])]
    assert routers
    assert {row.algorithm for row in routers} == {"adamw"}


def test_lists_of_linear_experts_are_matrices_one_by_one(run):
    matrices, _ = plain_groups(run.unfused)
    found = {row.name: row.layout for row in plan_parameters(run.unfused) if row.layout}
    assert found == {name: "o i" for name, _ in matrices["params"]}
