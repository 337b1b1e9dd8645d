"""What a parameter is called without the wrappers around its modules."""

from __future__ import annotations

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
