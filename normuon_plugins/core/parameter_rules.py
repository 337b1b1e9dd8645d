"""Which algorithm and layout a parameter gets: ordered rules, the first match decides, each with its reason.

A rule goes by the module that owns the parameter and what stands around it, never by the name of the model. What no
rule recognises goes to AdamW, which is safe for everything, and says so.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from torch import Tensor, nn

from normuon_plugins.core.adapter_rules import adapted_weight, adapter_decision
from normuon_plugins.core.decision import Decision
from normuon_plugins.core.expert_facts import ExpertFacts, expert_pair
from normuon_plugins.core.fused_facts import RAW_PROJECTIONS
from normuon_plugins.core.fused_weights import Fused, find_fused, find_heads
from normuon_plugins.core.layout import parse_layout
from normuon_plugins.core.model_facts import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS, ModelFacts, Owner, is_linear

# An image has at most RGB and depth; more input channels mean that the convolution reads features.
IMAGE_CHANNELS = 4
# Begin of the reason of whatever fell to the default.
NOT_RECOGNISED = "not recognised"
_ROUTER = re.compile(r"(^|_)(gate|router|switch|wg)$")
_PATCH_EMBEDDING = re.compile(r"patch_embed(der|ding|dings)?")
_POSITION_TABLE = re.compile(r"rel(ative)?_pos\w*(bias|table)\w*")
# Raw parameters of these names are looked up or broadcast, not multiplied with.
_TABLE = re.compile(
    r"token|embed|encoding|(^|_)(pos|emb|cls|rel_pos\w*|query|queries|latents?\w*|probe|prompt|codevectors|level|mask)(_|$)"
    r"|pointer|extensor|pad_(up|down|left|right)"
)
_FUSED = re.compile(r"(^|_)(qkv\w*|wqkv|query_key_value|kv|gate_up\w*|up_gate\w*)(_|$)", re.IGNORECASE)


class PlanOptions(NamedTuple):
    """The options of ``plan_parameters`` that rules read; see there."""

    lora: str = "adamw"
    split_fused: bool = True
    per_head: bool = False


def decide(parameter: Tensor, facts: ModelFacts, options: PlanOptions) -> Decision:
    """Return the decision of the first rule that recognises ``parameter`` at any place where it hangs.

    Args:
        parameter: A trainable parameter of the model behind ``facts``.
        facts: The model.
        options: Of the plan.
    """
    decision = _first_rule(parameter, facts, options)
    if parameter.is_complex():
        return Decision(None, "complex: AdamW, on real and imaginary parts", decision.decay)
    return decision


def _first_rule(parameter: Tensor, facts: ModelFacts, options: PlanOptions) -> Decision:
    owners = facts.owners[parameter]
    for owner in owners:
        if found := _adapter(owner, parameter, facts, options):
            return found
    if parameter.ndim < 2:
        return Decision(None, f"{parameter.ndim}-D: bias, gain or scalar", decay=False)
    for owner in owners:
        if found := _table_or_head(owner, facts) or _router(owner, parameter, facts.experts):
            return found
    for owner in owners:
        if found := _projection(owner, parameter, options) or _convolution(owner, parameter, options):
            return _doubt(found, owner, facts)
        if found := _experts(owner, parameter, options):
            return found
    return _other(owners[0], parameter)


def _other(owner: Owner, parameter: Tensor) -> Decision:
    """What no layer multiplies with, as far as structure tells, and whatever is not recognised at all."""
    kind, attribute = type(owner.module).__name__, owner.attribute
    if "bias" in attribute:
        return Decision(None, f"bias of {kind}", decay=False)
    if isinstance(owner.module, (nn.RNNBase, nn.RNNCellBase)):
        return Decision(None, f"recurrent weight of {kind}")
    if "parametrizations" in owner.name.split("."):
        return Decision(None, "factor of a parametrization")
    if parameter.numel() == max(parameter.shape):
        return Decision(None, f"vector {attribute!r} of {kind}", decay=False)
    # Mamba's own code marks state-space parameters that must not decay with this attribute; on meta, nothing does.
    if getattr(parameter, "_no_weight_decay", False) or attribute in ("A_log", "D"):
        return Decision(None, f"state-space parameter {attribute!r} of {kind}", decay=False)
    if parameter.shape[0] == 1 or _TABLE.search(attribute) or "Embedding" in kind:
        return Decision(None, f"table or token {attribute!r} of {kind}")
    return Decision(None, f"{NOT_RECOGNISED}: {attribute!r} of {kind}")


def _matrix(parameter: Tensor, layout: str, reason: str) -> Decision:
    """Return NorMuon with ``layout``, or AdamW where its matrices are single rows or columns."""
    for _, rows, cols in parse_layout(layout).matrix_shapes(parameter.shape):
        if min(rows, cols) <= 1:
            return Decision(None, f"{reason}, but {rows} x {cols} is no matrix")
    return Decision(layout, reason)


def _weight(owner: Owner, parameter: Tensor, layout: str, reason: str, options: PlanOptions) -> Decision:
    """Return the decision for a weight read as ``layout``, divided where a fact says that it is fused."""
    axes = layout.split(" ")
    neurons = parameter.shape[axes.index("o")]
    for holder, attribute in owner.places():
        if fused := find_fused(holder, attribute, neurons):
            if len(fused.sizes) == 1:  # all but one are empty in this layer
                return _matrix(parameter, layout, reason)
            return _divide(parameter, layout, reason, fused, options)
    holder, attribute = owner.places()[0]
    if options.per_head and (size := find_heads(holder, attribute, neurons)) != 0:
        if size is None:
            return _matrix(parameter, layout, f"{reason}; its heads are not known: whole matrix")
        heads = Fused((neurons,), False, (size,)).axis(neurons, split_fused=True, per_head=True)
        return _matrix(parameter, layout.replace("o", heads), f"{reason}, by heads")
    if _FUSED.search(attribute):
        reason = f"{reason}; it seems to be fused, but nothing tells how: whole matrix"
    return _matrix(parameter, layout, reason)


def _divide(parameter: Tensor, layout: str, reason: str, fused: Fused, options: PlanOptions) -> Decision:
    axis = fused.axis(
        parameter.shape[layout.split(" ").index("o")], split_fused=options.split_fused, per_head=options.per_head
    )
    if axis == "o":
        return _matrix(parameter, layout, f"{reason}, fused: whole matrix")
    divided = layout.replace("o", axis)
    if any(min(rows, cols) <= 1 for _, rows, cols in parse_layout(divided).matrix_shapes(parameter.shape)):
        return _matrix(parameter, layout, f"{reason}, fused with a single row: whole matrix")
    return Decision(divided, f"{reason}, fused" + (", by heads" if options.per_head and any(fused.heads) else ""))


def _adapter(owner: Owner, parameter: Tensor, facts: ModelFacts, options: PlanOptions) -> Decision | None:
    """LoRA factors and their kin, before anything else would see two ordinary layers."""
    found = adapter_decision(owner, parameter, options.lora)
    if found is None or found.layout is None:
        return found
    adapted = adapted_weight(owner)
    if adapted is not None and adapted in facts.owners:
        for place in facts.owners[adapted]:
            if whole := _table_or_head(place, facts) or _router(place, adapted, facts.experts):
                return Decision(None, f"{found.reason}, of a weight on AdamW ({whole.reason})")
    return _matrix(parameter, found.layout, found.reason)


def _table_or_head(owner: Owner, facts: ModelFacts) -> Decision | None:
    if facts.is_embedding(owner.module):
        return Decision(None, "embedding")
    if facts.is_head(owner.module):
        return Decision(None, "output head")
    if is_linear(owner.module):
        holder, attribute = owner.places()[0]
        if _POSITION_TABLE.fullmatch(attribute) and getattr(owner.module, "bias", None) is None:
            return Decision(None, "relative-position table")
        if facts.reads_patches(owner) or _embeds_patches(holder, attribute):
            return Decision(None, f"{type(owner.module).__name__} that embeds patches")
    return None


def _embeds_patches(holder: nn.Module | None, attribute: str) -> bool:
    return "PatchEmbed" in type(holder).__name__ or _PATCH_EMBEDDING.fullmatch(attribute) is not None


def _router(owner: Owner, parameter: Tensor, experts: ExpertFacts) -> Decision | None:
    """Routers score experts: one row per expert that stands beside them, or anything inside a module called Router."""
    if parameter.ndim != 2 or owner.attribute != "weight":
        return None
    rows = parameter.shape[0]
    if rows == 1 and is_linear(owner.module):
        return Decision(None, "gate with one output")
    name = owner.places()[0][1]
    # A router may wrap its one Linear, so that the experts stand beside the wrapper.
    near = [("", module) for module in (owner.module, *owner.ancestors[:1]) if rows in experts.counts(module)]
    for ancestor in owner.ancestors[: len(owner.places())]:
        near += experts.children(ancestor).get(rows, [])
    for beside, module in near:
        is_list = isinstance(module, (nn.ModuleList, nn.ModuleDict))
        # any layers may be as many as a projection has outputs; experts, or what a gate stands beside, may not
        if not is_list or "expert" in beside or _ROUTER.search(name):
            return Decision(None, "router: one row per expert")
    for module in (owner.module, *owner.ancestors):
        if "Router" in type(module).__name__ and not experts.children(module):
            return Decision(None, f"inside {type(module).__name__}")
    return Decision(None, f"called {name!r}") if name.endswith("router") else None


def _projection(owner: Owner, parameter: Tensor, options: PlanOptions) -> Decision | None:
    module, attribute, kind = owner.module, owner.attribute, type(owner.module).__name__
    if is_linear(module) and attribute == "weight":
        return _weight(owner, parameter, "o i", kind, options)
    # transformers.pytorch_utils.Conv1D, known by its only size attribute: nf, the number of outputs.
    if kind == "Conv1D" and hasattr(module, "nf") and attribute == "weight":
        return _weight(owner, parameter, "i o", "Conv1D, stored (in, out)", options)
    if isinstance(module, nn.MultiheadAttention):
        size, head = module.embed_dim, module.head_dim
        if attribute == "in_proj_weight":
            fused = Fused((size,) * 3, False, (head,) * 3)
            return _divide(parameter, "o i", "query, key and value of MultiheadAttention", fused, options)
        if attribute in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
            axis = Fused((size,), False, (head,)).axis(size, split_fused=True, per_head=options.per_head)
            return _matrix(parameter, f"{axis} i", "projection of MultiheadAttention")
    layout = RAW_PROJECTIONS.get((kind, attribute))
    return _weight(owner, parameter, layout, f"projection {attribute!r} of {kind}", options) if layout else None


def _convolution(owner: Owner, parameter: Tensor, options: PlanOptions) -> Decision | None:
    module, kind = owner.module, type(owner.module).__name__
    if owner.attribute != "weight" or not isinstance(module, CONVOLUTIONS + TRANSPOSED_CONVOLUTIONS):
        return None
    kernel = " i" * len(module.kernel_size)
    if module.in_channels == module.groups:
        return Decision(None, f"{kind} with one input channel per group")
    if isinstance(module, TRANSPOSED_CONVOLUTIONS) and module.groups > 1:
        return Decision(None, f"{kind} with groups, whose neurons are spread over two dimensions")
    if isinstance(module, TRANSPOSED_CONVOLUTIONS):
        return _weight(owner, parameter, "i o" + kernel, kind, options)
    reads_pixels = module.in_channels <= IMAGE_CHANNELS and max(module.kernel_size) > 1
    if reads_pixels and (module.kernel_size == module.stride or _embeds_patches(*owner.places()[0])):
        return Decision(None, f"{kind} that embeds patches")
    return _weight(owner, parameter, "o i" + kernel, kind, options)


def _doubt(found: Decision, owner: Owner, facts: ModelFacts) -> Decision:
    """Say of a matrix that it may be the output head, where nothing tells which layer that is."""
    if found.layout is None or not facts.may_be_head(owner.module):
        return found
    doubt = "the last one, and no output head was recognised: override it if this is the head"
    return found._replace(reason=f"{found.reason} ({doubt})")


def _experts(owner: Owner, parameter: Tensor, options: PlanOptions) -> Decision | None:
    """Stacked expert weights, (E, out, in) or (E, in, out), told apart by the module's flag or its pair of weights."""
    if parameter.ndim != 3:
        return None
    module, kind = owner.module, type(owner.module).__name__
    transposed = getattr(module, "is_transposed", None)
    if isinstance(transposed, bool):
        layout = "e i o" if transposed else "e o i"
        return _weight(owner, parameter, layout, f"experts, is_transposed={transposed}", options)
    up, down = expert_pair(module)
    if up is not None and down is not None:
        stored_out_in = up.shape[2] == down.shape[1]
        stored_in_out = up.shape[1] == down.shape[2]
        if stored_out_in and stored_in_out:  # up (a, b), down (b, a): only the model's width can tell
            width = getattr(module, "hidden_size", getattr(module, "hidden_dim", None))
            stored_in_out = width == up.shape[1] and width != up.shape[2]
            stored_out_in = not stored_in_out
        if stored_out_in:
            return _weight(owner, parameter, "e o i", f"experts of {kind}, stored (experts, out, in)", options)
        if stored_in_out:
            return _weight(owner, parameter, "e i o", f"experts of {kind}, stored (experts, in, out)", options)
    if owner.attribute == "weight" and getattr(module, "num_experts", None) == parameter.shape[0]:
        return _weight(owner, parameter, "e o i", f"experts of {kind}, stored (experts, out, in)", options)
    return None
