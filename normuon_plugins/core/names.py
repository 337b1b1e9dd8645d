"""What modules and parameters are, and are called, without the wrappers of torch around them."""

from __future__ import annotations

import re

from torch import nn

# What torch puts into the names of a module that it wraps: torch.compile, activation checkpointing, FSDP1. DDP's
# "module" is not here: models have parts of that name.
WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})


def unwrapped_name(name: str) -> str:
    """Return the FQN ``name`` as it is where nothing is compiled, checkpointed or wrapped.

    Example:
        >>> unwrapped_name("layers.0._orig_mod.q_proj.weight")
        'layers.0.q_proj.weight'
    """
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def has_match(pattern: str, name: str) -> bool:
    """Return whether the regular expression ``pattern`` is found in an FQN, with torch's wrappers in it or without.

    Example:
        >>> has_match(r"^layers\\.0\\.q_proj", "_orig_mod.layers.0._orig_mod.q_proj.weight")
        True
    """
    return any(re.search(pattern, written) for written in (name, unwrapped_name(name)))


def unwrapped_module(module: nn.Module) -> nn.Module:
    """Return what is inside the wrappers of torch around ``module``; the module itself where there are none.

    Example:
        >>> layer, wrapper = nn.Linear(2, 2), nn.Module()
        >>> wrapper._orig_mod = layer  # as torch.compile keeps it
        >>> unwrapped_module(wrapper) is layer
        True
    """
    while (wrapped := WRAPPERS & module._modules.keys()) and (inner := module._modules[min(wrapped)]) is not None:
        module = inner
    return module
