"""Which algorithm and layout a parameter gets: ordered rules, the first match decides, each with its reason.

A rule goes by the module that owns the parameter, never by the name of the model or of the parameter alone. What no
rule recognises goes to AdamW, which is safe for everything.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from normuon_plugins.core.layout import parse_layout
from normuon_plugins.core.model_facts import ModelFacts, Owner

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# An image has at most RGB and depth; more input channels mean that the convolution reads features.
IMAGE_CHANNELS = 4
# What modules of mixtures call their number of experts.
EXPERT_COUNTS = ("num_experts", "n_routed_experts", "num_local_experts")
LORA_POLICIES = ("adamw", "normuon", "b")


class Decision(NamedTuple):
    """What a rule says of a parameter.

    Attributes:
        layout: Layout string of a matrix parameter; None means AdamW.
        reason: One phrase for the table.
        decay: Whether weight decay applies to it.
    """

    layout: str | None
    reason: str
    decay: bool = True


def decide(parameter: Tensor, facts: ModelFacts, lora: str) -> Decision:
    """Return the decision of the first rule that recognises ``parameter`` at any place where it hangs.

    Args:
        parameter: A trainable parameter of the model behind ``facts``.
        facts: The model.
        lora: One of ``LORA_POLICIES``.
    """
    owners = facts.owners[parameter]
    if parameter.ndim < 2:
        return Decision(None, f"{parameter.ndim}-D: bias, gain or scalar", decay=False)
    for owner in owners:
        if found := _lora(owner, parameter, lora):
            return found if found.layout is None else _matrix(parameter, found)
    for owner in owners:
        if found := _table_or_head(owner, facts) or _router(owner, parameter):
            return found
    for owner in owners:
        if found := _projection(owner, facts) or _convolution(owner) or _experts(owner, parameter):
            return found if found.layout is None else _matrix(parameter, found)
    owner = owners[0]
    kind = type(owner.module).__name__
    if "bias" in owner.attribute:
        return Decision(None, f"bias of {kind}", decay=False)
    # transformers marks state-space matrices that must not decay (A_log, D of Mamba) with this attribute.
    decay = not getattr(parameter, "_no_weight_decay", False)
    return Decision(None, f"not recognised: {owner.attribute!r} of {kind}", decay)


def _matrix(parameter: Tensor, decision: Decision) -> Decision:
    """Return ``decision``, or AdamW where its matrices are single rows or columns."""
    assert decision.layout is not None
    for _, rows, cols in parse_layout(decision.layout).matrix_shapes(parameter.shape):
        if min(rows, cols) <= 1:
            return Decision(None, f"{decision.reason}, but {rows} x {cols} is no matrix")
    return decision


def _lora(owner: Owner, parameter: Tensor, policy: str) -> Decision | None:
    """LoRA factors (PEFT): by policy, before anything else would see two ordinary layers."""
    parts = set(owner.name.split("."))
    if parts & {"lora_embedding_A", "lora_embedding_B"}:
        return Decision(None, "LoRA factor of an embedding")
    for factor in ("A", "B"):
        if f"lora_{factor}" in parts:
            on_normuon = policy == "normuon" or (policy == "b" and factor == "B")
            layout = " ".join("o" + "i" * (parameter.ndim - 1)) if on_normuon else None
            return Decision(layout, f"LoRA factor {factor}, lora={policy!r}")
    return None


def _table_or_head(owner: Owner, facts: ModelFacts) -> Decision | None:
    if facts.is_embedding(owner.module):
        return Decision(None, "embedding")
    if facts.is_head(owner.module):
        return Decision(None, "output head")
    return None


def _router(owner: Owner, parameter: Tensor) -> Decision | None:
    """Routers score experts: one row per expert that stands beside them, or anything inside a module called Router."""
    if parameter.ndim != 2 or owner.attribute != "weight":
        return None
    rows = parameter.shape[0]
    if rows == 1 and isinstance(owner.module, nn.Linear):
        return Decision(None, "gate with one output")
    # A router may wrap its one Linear, so that the experts stand beside the wrapper.
    wrapped = owner.ancestors and sum(weight.ndim == 2 for weight in owner.ancestors[0].parameters()) == 1
    around = [child for ancestor in owner.ancestors[: 2 if wrapped else 1] for child in ancestor.children()]
    if any(rows in _expert_counts(module) for module in [owner.module, *owner.ancestors[:1], *around]):
        return Decision(None, "router: one row per expert")
    for module in (owner.module, *owner.ancestors):
        if "Router" in type(module).__name__ and not any(map(_expert_counts, module.children())):
            return Decision(None, f"inside {type(module).__name__}")
    return None


def _expert_counts(module: nn.Module) -> set[int]:
    """Return the numbers of experts that ``module`` may hold: as an attribute, as a collection, as stacked weights."""
    counts = {stack.shape[0] for stack in _expert_pair(module) if stack is not None}
    counts |= {getattr(module, name) for name in EXPERT_COUNTS if isinstance(getattr(module, name, None), int)}
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        counts.add(len(module))
    return counts


def _projection(owner: Owner, facts: ModelFacts) -> Decision | None:
    module, attribute = owner.module, owner.attribute
    if isinstance(module, nn.Linear) and attribute == "weight":
        kind = type(module).__name__
        doubt = " (the last one, and no output head was recognised: override it if this is the head)"
        return Decision("o i", kind + doubt if facts.may_be_head(module) else kind)
    # transformers.pytorch_utils.Conv1D, known by its only size attribute: nf, the number of outputs.
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf") and attribute == "weight":
        return Decision("i o", "Conv1D, stored (in, out)")
    if isinstance(module, nn.MultiheadAttention):
        if attribute == "in_proj_weight":
            size = module.embed_dim
            return Decision(f"o={size}+{size}+{size} i", "query, key and value of MultiheadAttention")
        if attribute in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
            return Decision("o i", "projection of MultiheadAttention")
    return None


def _convolution(owner: Owner) -> Decision | None:
    module, kind = owner.module, type(owner.module).__name__
    if owner.attribute != "weight" or not isinstance(module, CONVOLUTIONS + TRANSPOSED_CONVOLUTIONS):
        return None
    kernel = " i" * len(module.kernel_size)
    if module.in_channels == module.groups:
        return Decision(None, f"{kind} with one input channel per group")
    if isinstance(module, TRANSPOSED_CONVOLUTIONS) and module.groups > 1:
        return Decision(None, f"{kind} with groups, whose neurons are spread over two dimensions")
    if isinstance(module, TRANSPOSED_CONVOLUTIONS):
        return Decision("i o" + kernel, kind)
    if module.kernel_size == module.stride and module.in_channels <= IMAGE_CHANNELS and max(module.kernel_size) > 1:
        return Decision(None, f"{kind} that embeds patches")
    return Decision("o i" + kernel, kind)


def _experts(owner: Owner, parameter: Tensor) -> Decision | None:
    """Stacked expert weights, (E, out, in) or (E, in, out), told apart by the module's flag or its pair of weights."""
    if parameter.ndim != 3:
        return None
    module, kind = owner.module, type(owner.module).__name__
    transposed = getattr(module, "is_transposed", None)
    if isinstance(transposed, bool):
        return Decision("e i o" if transposed else "e o i", f"experts, is_transposed={transposed}")
    up, down = _expert_pair(module)
    if up is not None and down is not None:
        stored_out_in = up.shape[2] == down.shape[1]
        stored_in_out = up.shape[1] == down.shape[2]
        if stored_out_in and stored_in_out:  # up (a, b), down (b, a): only the model's width can tell
            width = getattr(module, "hidden_size", getattr(module, "hidden_dim", None))
            stored_in_out = width == up.shape[1] and width != up.shape[2]
            stored_out_in = not stored_in_out
        if stored_out_in:
            return Decision("e o i", f"experts of {kind}, stored (experts, out, in)")
        if stored_in_out:
            return Decision("e i o", f"experts of {kind}, stored (experts, in, out)")
    if owner.attribute == "weight" and getattr(module, "num_experts", None) == parameter.shape[0]:
        return Decision("e o i", f"experts of {kind}, stored (experts, out, in)")
    return None


def _expert_pair(module: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """Return the stacked weights into and out of the experts' hidden layer, where a module holds both."""
    stacks = {name: weight for name, weight in module.named_parameters(recurse=False) if weight.ndim == 3}
    up = next((stacks[name] for name in ("gate_up_proj", "up_proj", "gate_proj") if name in stacks), None)
    return up, stacks.get("down_proj")
