"""Which parameters belong to an adapter (LoRA and its kin), and what the ``lora`` policy makes of each.

Adapters are known by structure, and no library of them is imported. A PEFT layer lists the attributes that hold its
adapters in ``adapter_layer_names``; a tuner keeps what its layers share beside the model that it wraps; the factors of
other libraries and of hand-written layers stand in pairs, under names that nothing else has.

Only the factors of a layer that computes ``B (A x)`` can go to NorMuon. Other adapters are no matrices that activations
pass through (rotations, Hadamard and Kronecker products, scales, prompts): AdamW under every policy.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn

from normuon_plugins.core.decision import Decision
from normuon_plugins.core.model_facts import Owner
from normuon_plugins.core.names import unwrapped_module, unwrapped_name

LORA_POLICIES = ("adamw", "normuon", "b")
# Names of the factors A and B.
PAIRS = (
    ("lora_A", "lora_B"),  # PEFT (also DoRA, AdaLoRA and X-LoRA) and loralib
    ("lora_a", "lora_b"),  # torchtune
    ("lora_down", "lora_up"),  # kohya's sd-scripts
    # Tuners of PEFT that apply a pair as LoRA does, with scales before, between or after.
    ("gralora_A", "gralora_B"),
    ("gralora_A_general", "gralora_B_general"),
    ("delora_A", "delora_B"),
    ("supertuning_lora_A", "supertuning_lora_B"),
)
# Name -> which factor it is, and the name of the other.
FACTORS = {a: ("A", b) for a, b in PAIRS} | {b: ("B", a) for a, b in PAIRS}
# Factors of GraLoRA, one per block, multiplied from the right: (blocks, in, rank) and (blocks, rank, out).
BLOCKWISE = ("gralora_A", "gralora_B")
# Copies of whole modules that are trained in their place; what the original was decides.
COPIES = ("modules_to_save", "ln_tuning_layers")
# Where a tuner of PEFT keeps the model that it adapts.
WRAPPED = ("model", "lora_model")


class Slot(NamedTuple):
    """The place of an adapter.

    Attributes:
        holder: The adapted layer, or the tuner.
        name: The attribute of ``holder`` under which the parameter hangs, directly or deeper.
        factor: ``"A"`` or ``"B"`` of a low-rank product; None for any other adapter.
    """

    holder: nn.Module
    name: str
    factor: str | None = None


def adapter_decision(owner: Owner, parameter: Tensor, policy: str) -> Decision | None:
    """Return the decision for a parameter of an adapter, or None if it belongs to none.

    Args:
        owner: A place where ``parameter`` hangs.
        parameter: Of any shape.
        policy: ``"adamw"`` sends every adapter to AdamW, ``"normuon"`` low-rank factors to NorMuon, ``"b"`` the
            factors B only.
    """
    slot = _find_slot(owner)
    if slot is None or slot.name in COPIES:
        return None
    if slot.factor is None:
        return _no_factor(slot.name, parameter)
    if parameter.ndim < 2:
        return Decision(None, f"bias of LoRA factor {slot.factor}", decay=False)
    if isinstance(slot.holder, nn.Embedding):
        return Decision(None, "LoRA factor of an embedding")
    if policy == "adamw" or (policy == "b" and slot.factor == "A"):
        return Decision(None, f"LoRA factor {slot.factor}, lora={policy!r}")
    return _matrix_factor(slot, owner, parameter, f"LoRA factor {slot.factor}, lora={policy!r}")


def adapted_weight(owner: Owner) -> Tensor | None:
    """Return the weight that a low-rank factor adapts, or None if ``owner`` holds no such factor or none is in sight.

    A factor of a head, a table or a router is one as little as the weight itself is a hidden matrix; the rules for
    that weight decide. A packed weight has another shape than the matrix it stands for.
    """
    slot = _find_slot(owner)
    if slot is None or slot.factor is None:
        return None
    layer = slot.holder
    while isinstance(inner := layer._modules.get("base_layer"), nn.Module):
        layer = inner
    # PEFT's wrapper of a raw parameter says which; torch's attention has no attribute called weight.
    for name in (getattr(slot.holder, "parameter_name", None), "weight", "in_proj_weight"):
        if isinstance(name, str) and isinstance(weight := getattr(layer, name, None), Tensor):
            return weight
    return None


def _find_slot(owner: Owner) -> Slot | None:
    """Return the nearest place above or at ``owner`` that is an adapter's."""
    for holder, name in _way_up(owner):
        if name in FACTORS:
            return Slot(holder, name, FACTORS[name][0])
        if name in ("down", "up") and _is_pair_of_diffusers(holder):
            return Slot(holder, name, "A" if name == "down" else "B")
        if _is_adapter(holder, name):
            return Slot(holder, name)
    return None


def _way_up(owner: Owner) -> Iterator[tuple[nn.Module, str]]:
    """Yield each module above the parameter with the name, there, of what leads down to it."""
    child: nn.Module | None = None
    names = unwrapped_name(owner.name).split(".")
    for holder, name in zip((owner.module, *owner.ancestors), reversed(names), strict=False):
        below = holder._modules.get(name)
        if child is not None and (below is None or unwrapped_module(below) is not child):
            return  # something between the two was left out of the ancestors
        yield holder, name
        child = holder


def _has(module: nn.Module, *names: str) -> bool:
    return all(module._modules.get(name) is not None or module._parameters.get(name) is not None for name in names)


def _is_pair_of_diffusers(holder: nn.Module) -> bool:
    """Return whether ``holder`` is a LoRALinearLayer or LoRAConv2dLayer, whose factors have common names."""
    return type(holder).__name__.startswith("LoRA") and {"down", "up"} <= holder._modules.keys()


def _is_adapter(holder: nn.Module, name: str) -> bool:
    """Return whether PEFT keeps an adapter under ``name`` in ``holder``."""
    # Asked of the class first, since PEFT's models answer for the model that they wrap.
    if hasattr(type(holder), "adapter_layer_names"):  # a layer; variants of LoRA add to the names of an instance
        names: tuple[str, ...] = getattr(holder, "adapter_layer_names", ())
        return name in names
    if hasattr(type(holder), "inject_adapter"):  # a tuner
        return name not in WRAPPED
    if name == "prompt_encoder":
        return _has(holder, "base_model")
    return name in ("adaption_prompt", "adaption_gate") and _has(holder, "adaption_prompt", "adaption_gate")


def _no_factor(name: str, parameter: Tensor) -> Decision:
    if "embedding" in name or "token" in name:
        return Decision(None, f"adapter {name!r} of an embedding")
    if parameter.ndim == 0 or parameter.numel() == max(parameter.shape):
        return Decision(None, f"adapter {name!r}, a vector", decay=False)
    return Decision(None, f"adapter {name!r}, no LoRA factor")


def _matrix_factor(slot: Slot, owner: Owner, parameter: Tensor, reason: str) -> Decision:
    """Return the layout of a factor, or AdamW where its matrices cannot be told apart."""
    if slot.name in BLOCKWISE:
        return Decision("e i o", f"{reason}: one per block")
    if owner.module is slot.holder:
        return _raw_factor(slot, parameter, reason)
    if owner.attribute != "weight" and not isinstance(owner.module, nn.ParameterDict):
        return Decision(None, f"{reason}, but {owner.attribute!r} of {type(owner.module).__name__} is not known")
    experts = _count(slot.holder, "num_experts") if hasattr(slot.holder, "parameter_name") else 1
    if experts > 1 and slot.factor == "B":  # (out, rank * experts): column k belongs to expert k % experts
        return Decision(None, f"{reason}, but its columns are those of {experts} experts in turns")
    if experts > 1:  # (experts * rank, in)
        return Decision(_blocks(parameter, experts), f"{reason}: one per expert")
    parts = _count(owner.module, "nblocks")  # BD-LoRA is block-diagonal: (parts * out, in), each with inputs of its own
    if parts > 1:
        return Decision(_blocks(parameter, parts), f"{reason}: one per block")
    return Decision(" ".join("o" + "i" * (parameter.ndim - 1)), reason)


def _raw_factor(slot: Slot, parameter: Tensor, reason: str) -> Decision:
    """Return the layout of a factor that is a bare parameter: the smallest size that both share is the rank."""
    other = slot.holder._parameters.get(FACTORS[slot.name][1])
    if other is None or parameter.ndim != 2 or other.ndim != 2:
        return Decision(None, f"{reason}, but the other factor is no matrix like it")
    a, b = (parameter, other) if slot.factor == "A" else (other, parameter)
    readings = []
    if a.shape[0] == b.shape[1]:  # (rank, in) and (out, rank)
        readings.append((a.shape[0], "o i", reason))
    if a.shape[1] == b.shape[0]:  # (in, rank) and (rank, out): x @ A @ B
        readings.append((a.shape[1], "i o", reason))
    # loralib's MergedLinear, a pair for each of the projections that share a weight: (parts * rank, in) and
    # (parts * out, rank)
    parts, left = divmod(a.shape[0], b.shape[1])
    if parts > 1 and left == 0 and b.shape[0] % parts == 0:
        readings.append((b.shape[1], _blocks(parameter, parts), f"{reason}: one per projection"))
    if not readings:
        return Decision(None, f"{reason}, but shapes {tuple(a.shape)} and {tuple(b.shape)} share no rank")
    _, layout, reason = min(readings, key=lambda reading: reading[0])
    return Decision(layout, reason)


def _count(module: nn.Module, attribute: str) -> int:
    count = getattr(module, attribute, 1)
    return count if isinstance(count, int) else 1


def _blocks(parameter: Tensor, count: int) -> str:
    return f"o={parameter.shape[0] // count}*{count} i"
