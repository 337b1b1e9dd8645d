"""From a checkpoint: the optimizer state in a file or folder of torch, the Trainer, Accelerate, Lightning or DCP."""

from __future__ import annotations

import inspect
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any

import torch
from torch import Tensor

from normuon_plugins.core.group_options import complete_group
from normuon_plugins.core.layout import parse_layout
from normuon_plugins.core.momentum import stored_momentum
from normuon_plugins.core.names import has_match
from normuon_plugins.core.optimizer import NorMuon
from normuon_plugins.core.optimizer_state import MEAN_SQUARE_KEY, state_specs
from normuon_plugins.diagnostics.dcp_folder import METADATA, check_stored, read_folder
from normuon_plugins.diagnostics.live import NESTEROV_NOTE
from normuon_plugins.diagnostics.spectra import (
    PER_PARAMETER,
    Diagnosis,
    MatrixDiagnosis,
    diagnose_parameter,
    with_distinct_names,
)

# What frameworks call the file or folder of the optimizer inside a checkpoint folder: the HF Trainer, Accelerate,
# Accelerate and the Trainer under FSDP2, Lightning.
FILES = ("optimizer.pt", "optimizer.bin", "optimizer_0", "*.ckpt", "*.pt", "*.bin")
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

    Needs neither the model nor a process group. Under ``weights_only`` no code of the file or folder runs.

    Args:
        path: A file that ``torch.save`` wrote with the optimizer's state dict somewhere in it; a folder of
            ``torch.distributed.checkpoint``, which is made whole in memory; or a checkpoint folder with either in it.
        match: Regular expression; only parameters with a match in their name are looked at.
        per_parameter: At most so many matrices of a parameter that holds several (experts, heads), evenly spaced.
        weights_only: As in ``torch.load``: False runs code that the file, or a shard in the folder, may bring.
        progress: Called with each parameter's name before it is looked at.

    Raises:
        FileNotFoundError: If there is no such path, or no optimizer file in the folder.
        ValueError: If no state of a NorMuon is found, ``match`` names none of it, or the file cannot be read.
    """
    path = Path(path)
    saved = find_state(_load(locate_optimizer(path), weights_only))
    if saved is None:
        raise ValueError(f"{path} holds no optimizer state: no dict with 'state' and 'param_groups' is in it.")
    parameters = _read_matrices(path, saved)
    if not parameters:
        algorithms = {group.get("algorithm") for group in saved["param_groups"]}
        raise ValueError(
            f"{path} holds no matrix parameter of NorMuon (algorithms of its groups: {sorted(map(str, algorithms))});"
            " another optimizer wrote it, or no step was taken."
        )
    chosen = [entry for entry in parameters if has_match(match, entry[0])]
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
    return Diagnosis(str(path), with_distinct_names(matrices), notes)


def locate_optimizer(path: Path) -> Path:
    """Return the file or folder of the optimizer's state in a checkpoint.

    Raises:
        FileNotFoundError: If there is none.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder.")
    if path.is_file() or (path / METADATA).is_file():
        return path
    for pattern in FILES:
        for found in sorted(path.glob(pattern)):
            if found.is_file() or (found / METADATA).is_file():
                return found
    raise FileNotFoundError(
        f"{path} holds no optimizer state that is known ({', '.join(FILES)}, or a folder with {METADATA});"
        " give the file itself."
    )


def find_state(saved: Any) -> Mapping[str, Any] | None:
    """Return the optimizer's state dict inside what a framework saved, whatever it is called there; None if none is.

    A state dict that ``torch.distributed.checkpoint`` flattened is put together again.
    """
    waiting, seen = [saved], set()
    while waiting:  # no recursion: what is nested deeper than Python's stack is no state dict, and no crash
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Mapping):
            if "param_groups" in value and "state" in value:
                return value
            if any(isinstance(key, str) and key.startswith("param_groups.") for key in value):
                return _unflatten(value)
            waiting += list(value.values())[::-1]
        elif isinstance(value, (list, tuple)):
            waiting += value[::-1]
    return None


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
    """Return what a file or a DCP folder holds, on the CPU.

    Raises:
        ValueError: In one sentence, whatever a damaged or hostile file does to its reader.
    """
    try:
        if path.is_dir():
            return read_folder(path, lambda part: _load_file(part, weights_only))
        with path.open("rb") as file:
            return _load_file(file, weights_only)
    except Exception as error:
        if weights_only and isinstance(error, UnpicklingError) and "Weights only" in str(error):
            raise ValueError(
                f"torch cannot read {path}: {_first_line(error)} If you trust its author, weights_only=False"
                " (--no-weights-only) runs the code that it brings."
            ) from error
        raise ValueError(f"torch cannot read {path}, it seems to be damaged: {_first_line(error)}") from error


def _load_file(file: IO[bytes], weights_only: bool) -> Any:
    """Return what ``torch.save`` wrote, which is never compressed: a few bytes could stand for any number of them."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("it is compressed, as torch.save never is")
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=weights_only)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _read_matrices(path: Path, saved: Mapping[str, Any]) -> list[tuple[str, dict[str, Tensor], Mapping[str, Any]]]:
    """Return what ``_matrices`` yields; ``ValueError`` in one sentence where that fails, whatever is wrong in it."""
    try:
        return list(_matrices(saved))
    except Exception as error:
        raise ValueError(f"{path} holds no state that a NorMuon wrote: {_first_line(error)}") from error


def _matrices(saved: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Tensor], Mapping[str, Any]]]:
    """Yield name, state and options of every matrix parameter that has state.

    Raises:
        ValueError: If a group's options are none that a NorMuon has, or state does not fit them. Other errors where
            groups and state are no groups and state at all.
    """
    defaults = {name: option.default for name, option in inspect.signature(NorMuon).parameters.items()}
    for group in saved["param_groups"]:
        if group.get("algorithm") != "normuon":
            continue
        options = complete_group(group, defaults)  # DCP's flattened form writes None as nothing at all
        names = group.get("param_names") or group["params"]
        for key, name in zip(group["params"], names, strict=True):
            state = saved["state"].get(key, saved["state"].get(str(key), {}))  # DCP writes numbers as words
            if all(wanted in state for wanted in MATRIX_KEYS):
                name = name if isinstance(name, str) else f"parameter {name}"
                yield name, _checked(name, state, options), options


def _checked(name: str, state: Mapping[str, Any], group: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return what is read of a parameter's state; raise ``ValueError`` where it does not fit the group's layout."""
    momentum = state["momentum_buffer"]
    specs = state_specs(momentum, group, kahan_sum=False, stored=momentum.dtype)
    parse_layout(group["layout"]).check(momentum.shape)
    checked: dict[str, Tensor] = {}
    for key, (shape, _) in specs.items():
        if key == MEAN_SQUARE_KEY and key not in state:
            continue
        check_stored(f"{key} of {name!r}", state[key])
        if tuple(state[key].shape) != shape:
            raise ValueError(f"{key} of {name!r} has shape {tuple(state[key].shape)} and needs {shape}")
        checked[key] = state[key].contiguous()
    return checked
