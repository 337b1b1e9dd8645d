"""What a plan refuses, and what it warns of: options, models whose matrices are hidden, rows that nobody meant."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from normuon_plugins.core.adapter_rules import LORA_POLICIES, adapter_decision
from normuon_plugins.core.group_options import TRAINABLE_DTYPES, is_flat_shard
from normuon_plugins.core.model_facts import ModelFacts
from normuon_plugins.core.parameter_rules import NOT_RECOGNISED
from normuon_plugins.core.plan_table import PlannedParameter, fold_rows
from normuon_plugins.core.quantized import is_quantized


def check_plan_options(lora: str, **switches: bool) -> None:
    """Raise ``ValueError`` for an option that cannot be, or two that contradict each other."""
    if lora not in LORA_POLICIES:
        raise ValueError(f"lora={lora!r} must be one of {LORA_POLICIES}.")
    for name, value in switches.items():
        if not isinstance(value, bool):  # any other word would count as True
            raise ValueError(f"{name}={value!r} must be True or False.")
    if switches["per_head"] and not switches["split_fused"]:
        raise ValueError(
            "per_head=True divides fused weights into heads, split_fused=False keeps them whole; choose one."
        )


def refuse_hidden_shapes(model: nn.Module) -> None:
    """Raise ``ValueError`` when shapes are not known yet, or another framework keeps flat pieces in their place."""
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ValueError(
                f"{name!r} of a lazy layer has no shape yet; run one batch through the model first, under"
                " torch.no_grad()."
            )
        if hasattr(parameter, "ds_shape"):
            seen = "a placeholder of DeepSpeed ZeRO-3"
        elif is_flat_shard(parameter):
            seen = "a flat 1-D shard of FSDP1"
        else:
            continue
        raise ValueError(
            f"There is no matrix for NorMuon: {name!r} is {seen}; use FSDP2 (fully_shard), which keeps the shapes."
        )


def obstacle(parameter: Tensor) -> str | None:
    """Return what keeps an optimizer from training ``parameter``, and the remedy; None if nothing does."""
    if is_quantized(parameter):
        return (
            f"requires a gradient but is quantized ({type(parameter).__name__}, {parameter.dtype}); freeze it and train"
            " an adapter on it, or load the model without quantization"
        )
    if parameter.dtype not in TRAINABLE_DTYPES:
        return f"requires a gradient but is {parameter.dtype}; freeze it or cast the model"
    return None


def refuse_unrecognised(trainable: Sequence[PlannedParameter]) -> None:
    """Raise ``ValueError`` when a parameter fell to the default rule."""
    unknown = [row for row in trainable if row.reason.startswith(NOT_RECOGNISED)]
    if unknown:
        listed = "\n".join(
            f"  {name}: adamw, {reason}" for name, reason in fold_rows((row.name, row.reason) for row in unknown)
        )
        raise ValueError(
            f"strict=True: no rule recognised {len(unknown)} parameters:\n{listed}\n"
            "Say what they are with overrides={pattern: 'adamw', 'normuon' or a layout}."
        )


def ask_for_matrices(
    model: nn.Module,
    trainable: Sequence[PlannedParameter],
    facts: ModelFacts,
    lora: str,
    *,
    strict: bool,
    allowed: bool,
) -> None:
    """Say it when no trainable row is a matrix, and what was seen instead.

    AdamW is right for all that there is, so that it is a warning, unless nothing is trained at all: a stage of a
    pipeline may hold the embedding alone. Adapters are on AdamW because ``lora`` says so.

    Args:
        model: Behind ``facts``.
        trainable: The rows of the parameters that require a gradient.
        facts: What the model says of its modules.
        lora: As in ``plan_parameters``.
        strict: Whether to raise in place of a warning.
        allowed: Whether no matrix is what the user means.

    Raises:
        ValueError: If there is nothing to train, or under ``strict``.
    """
    every = list(model.parameters())
    if not trainable:
        seen = f"all {len(every)} parameters are frozen" if every else "the model has no parameters"
        raise ValueError(f"There is no matrix for NorMuon: {seen}.")
    if allowed or any(row.algorithm == "normuon" for row in trainable):
        return
    adapted = any(
        adapter_decision(owner, row.parameter, lora) for row in trainable for owner in facts.owners[row.parameter]
    )
    if lora == "adamw" and adapted:
        message = (
            "every trainable matrix belongs to an adapter, and lora='adamw' sends those to AdamW: nothing is on"
            " NorMuon. lora='normuon' or lora='b' (the Trainer: optim_args='lora=b') puts low-rank factors on it;"
            " allow_no_matrix=True says that AdamW is meant."
        )
        strict = False  # asked for by a policy
    else:
        reasons = "; ".join(sorted({row.reason for row in trainable}))
        message = (
            f"There is no matrix for NorMuon: all {len(trainable)} trainable parameters went to AdamW ({reasons})."
            " Where that is meant (a pipeline stage without a layer, a probe, new embeddings alone), say"
            " allow_no_matrix=True; else name the matrices in overrides."
        )
    if strict:
        raise ValueError(f"strict=True: {message}")
    warnings.warn(message, stacklevel=3)
