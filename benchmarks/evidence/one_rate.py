"""What a user of the Trainer compares: AdamW, and NorMuon in its place at the same one learning rate."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from evidence.methods import PAPER, Method
from normuon_plugins import build_normuon

# The Trainer's, for AdamW and for what NorMuon leaves to AdamW.
BETAS, EPS, DECAY = (0.9, 0.999), 1e-8, 0.01

ADAMW = "AdamW"
# What embeddings, head, norms and biases take on AdamW may be another rate.
TWICE = "NorMuon, adamw_lr = 2 lr"
# Spelled out, so that a changed default changes no method: the ledger knows methods by name.
FIXED = {**PAPER, "nesterov": True, "adjust_lr_fn": "match_rms_adamw"}
PROGRESS = {**FIXED, "adjust_lr_fn": "match_progress_adamw"}
# name -> options of build_normuon; None is torch's AdamW on everything. ``adamw_lr_ratio`` is adamw_lr / lr.
METHODS: dict[str, dict[str, Any] | None] = {
    ADAMW: None,
    "NorMuon, fixed size": FIXED,
    "NorMuon": PROGRESS,
    TWICE: {**PROGRESS, "adamw_lr_ratio": 2.0},
}
# The same from scratch, where ``methods.make_optimizer`` has AdamW's betas for language models.
PRETRAINING_METHODS = {name: Method(name, options) for name, options in METHODS.items()}
# With lora="adamw", which is the default, both sizes are the same optimizer: no matrix is NorMuon's.
LORA_METHODS: dict[str, dict[str, Any] | None] = {
    ADAMW: None,
    "NorMuon, lora=adamw": {**PROGRESS, "lora": "adamw"},
    "NorMuon, fixed size, lora=normuon": {**FIXED, "lora": "normuon"},
    "NorMuon, lora=normuon": {**PROGRESS, "lora": "normuon"},
    "NorMuon, fixed size, lora=b": {**FIXED, "lora": "b"},
    "NorMuon, lora=b": {**PROGRESS, "lora": "b"},
}


def make_optimizer(model: nn.Module, method: str, lr: float) -> Optimizer:
    """Return the optimizer of a run; the same parameters decay under every method, those of two dimensions.

    Args:
        model: What it trains.
        method: One of ``METHODS`` or ``LORA_METHODS``.
        lr: Of everything.
    """
    options = {**METHODS, **LORA_METHODS}[method]
    if options is None:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in trained if (p.ndim > 1) is decays], "weight_decay": DECAY if decays else 0.0}
            for decays in (True, False)
        ]
        return torch.optim.AdamW([group for group in groups if group["params"]], lr, BETAS, EPS, fused=True)
    own = {key: value for key, value in options.items() if key != "adamw_lr_ratio"}
    adamw = {"adamw_betas": BETAS, "adamw_eps": EPS, "adamw_weight_decay": DECAY}
    adamw_lr = lr * options.get("adamw_lr_ratio", 1.0)
    return build_normuon(model, lr=lr, adamw_lr=adamw_lr, weight_decay=DECAY, **adamw, **own)
