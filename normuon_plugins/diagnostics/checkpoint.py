"""From a checkpoint: the optimizer state in a file or folder of torch, the Trainer, Accelerate, Lightning or DCP."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from normuon_plugins.core.group_options import GROUP_KEYS
from normuon_plugins.core.layout import parse_layout
from normuon_plugins.core.momentum import stored_momentum
from normuon_plugins.core.optimizer_state import MEAN_SQUARE_KEY
from normuon_plugins.diagnostics.live import NESTEROV_NOTE
from normuon_plugins.diagnostics.spectra import PER_PARAMETER, Diagnosis, MatrixDiagnosis, diagnose_parameter

# What frameworks call the file or folder of the optimizer inside a checkpoint folder: the HF Trainer, Accelerate,
# Accelerate and the Trainer under FSDP2, Lightning.
FILES = ("optimizer.pt", "optimizer.bin", "optimizer_0", "*.ckpt", "*.pt", "*.bin")
DCP_METADATA = ".metadata"
ORTHOGONALIZE_NOTE = (
    "A checkpoint does not hold orthogonalize_fn: directions are those of Newton-Schulz with the options of the groups."
)
MATRIX_KEYS = ("momentum_buffer", "second_momentum_buffer")


def read_checkpoint(
    path: str | Path,
    *,
    match: str = "",
    per_parameter: int = PER_PARAMETER,
    weights_only: bool = True,
    progress: Callable[[str], None] | None = None,
) -> Diagnosis:
    """Return singular values and neuron norms of the state in a checkpoint.

    Needs neither the model nor a process group.

    Args:
        path: A file that ``torch.save`` wrote with the optimizer's state dict somewhere in it; a folder of
            ``torch.distributed.checkpoint``, which is made whole in memory; or a checkpoint folder with either in it.
        match: Regular expression; only parameters with a match in their name are looked at.
        per_parameter: At most so many matrices of a parameter that holds several (experts, heads), evenly spaced.
        weights_only: As in ``torch.load``: False runs code that the file may bring.
        progress: Called with each parameter's name before it is looked at.

    Raises:
        FileNotFoundError: If there is no such path, or no optimizer file in the folder.
        ValueError: If no state of a NorMuon is found, ``match`` names none of it, or the file cannot be read.
    """
    path = Path(path)
    saved = find_state(_load(locate_optimizer(path), weights_only))
    if saved is None:
        raise ValueError(f"{path} holds no optimizer state: no dict with 'state' and 'param_groups' is in it.")
    parameters = list(_matrices(saved))
    if not parameters:
        algorithms = {group.get("algorithm") for group in saved["param_groups"]}
        raise ValueError(
            f"{path} holds no matrix parameter of NorMuon (algorithms of its groups: {sorted(map(str, algorithms))});"
            " another optimizer wrote it, or no step was taken."
        )
    chosen = [entry for entry in parameters if re.search(match, entry[0])]
    if not chosen:
        raise ValueError(f"{match!r} matches none of the {len(parameters)} matrix parameters: {parameters[0][0]}, ...")
    matrices: list[MatrixDiagnosis] = []
    for name, state, group in chosen:
        if progress is not None:
            progress(name)
        momentum = stored_momentum(state, parse_layout(group["layout"])).load(torch.float32)
        neurons = state["second_momentum_buffer"]
        matrices += diagnose_parameter(
            name,
            momentum,
            neurons,
            group,
            gradient_mean_square=state.get(MEAN_SQUARE_KEY),
            per_parameter=per_parameter,
        )
    notes = [ORTHOGONALIZE_NOTE]
    notes += [NESTEROV_NOTE] if any(group.get("nesterov") for _, _, group in chosen) else []
    return Diagnosis(str(path), matrices, notes)


def locate_optimizer(path: Path) -> Path:
    """Return the file or folder of the optimizer's state in a checkpoint.

    Raises:
        FileNotFoundError: If there is none.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder.")
    if path.is_file() or (path / DCP_METADATA).is_file():
        return path
    for pattern in FILES:
        for found in sorted(path.glob(pattern)):
            if found.is_file() or (found / DCP_METADATA).is_file():
                return found
    raise FileNotFoundError(
        f"{path} holds no optimizer state that is known ({', '.join(FILES)}, or a folder with {DCP_METADATA});"
        " give the file itself."
    )


def find_state(saved: Any) -> Mapping[str, Any] | None:
    """Return the optimizer's state dict inside what a framework saved, whatever it is called there; None if none is.

    A state dict that ``torch.distributed.checkpoint`` flattened is put together again.
    """
    if isinstance(saved, Mapping):
        if "param_groups" in saved and "state" in saved:
            return saved
        if any(isinstance(key, str) and key.startswith("param_groups.") for key in saved):
            return _unflatten(saved)
        inner: Any = saved.values()
    elif isinstance(saved, (list, tuple)):
        inner = saved
    else:
        return None
    return next((found for value in inner if (found := find_state(value)) is not None), None)


def _unflatten(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``{"state": ..., "param_groups": ...}`` for keys like ``state.FQN.key`` and ``param_groups.FQN.key``.

    Every parameter gets a group of its own, since that is how its options were written.
    """
    state: dict[str, dict[str, Any]] = {}
    groups: dict[str, dict[str, Any]] = {}
    for path, value in saved.items():
        kind, _, rest = path.partition(".")
        name, _, key = rest.rpartition(".")
        if kind == "state":
            state.setdefault(name, {})[key] = value
        elif kind == "param_groups" and key != "param_names":  # which are those of the whole group
            groups.setdefault(name, {"params": [name]})[key] = value
    return {"state": state, "param_groups": [group for group in groups.values() if "algorithm" in group]}


def _load(path: Path, weights_only: bool) -> Any:
    """Return what a file or a DCP folder holds, on the CPU."""
    if path.is_dir():
        # here, since it takes a second to import
        from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

        with tempfile.TemporaryDirectory() as folder:
            whole = Path(folder) / "whole.pt"
            dcp_to_torch_save(path, whole)
            return torch.load(whole, map_location="cpu", weights_only=weights_only)
    try:
        return torch.load(path, map_location="cpu", weights_only=weights_only)
    except (UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"torch cannot read {path}: {reason} If you trust its author, weights_only=False (--no-weights-only) runs"
            " the code that it brings."
        ) from error


def _matrices(saved: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Tensor], Mapping[str, Any]]]:
    """Yield name, state and options of every matrix parameter that has state."""
    for group in saved["param_groups"]:
        if group.get("algorithm") != "normuon":
            continue
        names = group.get("param_names") or group["params"]
        for key, name in zip(group["params"], names, strict=True):
            state = saved["state"].get(key, {})
            if all(wanted in state for wanted in MATRIX_KEYS):
                yield str(name) if isinstance(name, str) else f"parameter {name}", state, _complete(group)


def _complete(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a group's options; DCP's flattened form writes None as nothing at all."""
    return {**dict.fromkeys(GROUP_KEYS["normuon"]), **group}
