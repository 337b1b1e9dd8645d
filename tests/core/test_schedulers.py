"""Every schedule of torch moves the rates as it moves those of torch.optim.AdamW, floats and tensors alike."""

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from normuon_plugins import build_normuon

STEPS = 6
SCHEDULES = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.8),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.7),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 5, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 4, eta_min=1e-3),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-1, 2, cycle_momentum=False),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=STEPS + 1, cycle_momentum=False),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 4), nn.LayerNorm(4))


def normuon(model, lr):
    return build_normuon(model, lr=lr)


def adamw(model, lr):
    return torch.optim.AdamW([{"params": list(part.parameters())} for part in model], lr=lr)


def rates(make, lr, schedule):
    """Return the rates of all groups before every step; the steps are real ones."""
    model = network()
    optimizer = make(model, lr)
    scheduler = SCHEDULES[schedule](optimizer)
    found = []
    for _ in range(STEPS):
        found.append([float(group["lr"]) for group in optimizer.param_groups])
        model(torch.arange(8)).square().sum().backward()
        optimizer.step()
        scheduler.step(1.0) if schedule == "ReduceLROnPlateau" else scheduler.step()
    return found


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_floats_and_tensors_move_as_under_adamw(schedule):
    expected = rates(adamw, 0.1, schedule)
    assert len({tuple(row) for row in expected}) > 1
    for lr in (0.1, torch.tensor(0.1, dtype=torch.float64)):
        found = rates(normuon, lr, schedule)
        assert [row[0] for row in found] == pytest.approx([row[0] for row in expected], rel=1e-6)
        assert all(len(set(row)) == 1 for row in found)
