"""A folder of torch.distributed.checkpoint, read without running anything that it brings.

torch's own reader unpickles ``.metadata``, which may name any function, and loads whatever is no tensor likewise. Here
nothing that the file names is imported: every class becomes a record of what was stored. What the shards hold is loaded
as any file is, and no more memory is asked for than they fill.
"""

from __future__ import annotations

import io
import math
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

METADATA = ".metadata"
# Packages of the classes that torch writes there: its own records, sizes and dtypes, and the path of the folder.
KNOWN_PACKAGES = ("torch", "pathlib")
# Of a training checkpoint, the model's weights are the larger part; this finds what is the optimizer's.
OPTIMIZER_KEY = r"(^|\.)(state|param_groups)\."

# Returns what ``torch.save`` wrote to these bytes.
Load = Callable[[io.BytesIO], Any]


class Record:
    """Stands for an object of any class: its arguments and attributes, without its code."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        """Keep the attributes; a class that pickles something else keeps that as ``state``."""
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})


class _Reader(pickle._Unpickler):  # in Python: the one in C reserves as much memory as a file asks for
    def find_class(self, module: str, name: str) -> Any:
        """Return a new class of records; tuples for sizes."""
        if module.split(".")[0] not in KNOWN_PACKAGES:
            raise ValueError(
                f"{METADATA} asks for {module}.{name}, which no such checkpoint needs; nothing of it was run"
            )
        return tuple if (module, name) == ("torch", "Size") else type(name, (Record,), {})


def read_folder(folder: Path, load: Load) -> dict[str, Any]:
    """Return what belongs to an optimizer in a folder, in the dicts and lists that were saved.

    Args:
        folder: With ``.metadata`` and the shards in it.
        load: Reads one tensor, or one value that is none.

    Raises:
        ValueError: If something is missing or damaged; other errors where the folder is none of torch's.
    """
    metadata = _Reader(io.BytesIO((folder / METADATA).read_bytes())).load()
    places = metadata.planner_data or {}
    shards: dict[str, list[tuple[Any, Any]]] = {}
    for index, place in metadata.storage_data.items():
        if re.search(OPTIMIZER_KEY, index.fqn):
            shards.setdefault(index.fqn, []).append((getattr(index, "offset", None), place))
    saved: dict[Any, Any] = {}
    for name, parts in shards.items():
        values = [(offset, load(io.BytesIO(_stored_bytes(folder, place)))) for offset, place in parts]
        value = values[0][1]
        if isinstance(value, Tensor):
            value = _assembled(name, metadata.state_dict_metadata[name].size, values)
        _put(saved, places.get(name, (name,)), value)
    return {key: _with_lists(value) for key, value in saved.items()}


def check_stored(name: str, tensor: Tensor) -> None:
    """Raise ``ValueError`` for a tensor that has more elements than numbers were stored, or is no plain one."""
    plain = type(tensor) is Tensor and tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not plain or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(f"{name} is no plain tensor, or says that it is larger than what was stored")


def _stored_bytes(folder: Path, place: Any) -> bytes:
    if getattr(place, "transform_descriptors", None):
        raise ValueError(f"its shards are transformed ({place.transform_descriptors}), which torch alone can undo")
    name = Path(place.relative_path)
    path = folder / name
    if name.is_absolute() or ".." in name.parts or not path.is_file():
        raise ValueError(f"there is no shard {place.relative_path!r} in it")
    if place.offset + place.length > path.stat().st_size:
        raise ValueError(f"the shard {place.relative_path!r} is cut short")
    with path.open("rb") as file:
        file.seek(place.offset)
        return bytes(file.read(place.length))


def _assembled(name: str, size: tuple[int, ...], parts: list[tuple[Any, Tensor]]) -> Tensor:
    """Return a whole tensor from its shards, each with the index of its first element."""
    for _, part in parts:
        check_stored(name, part)
    if sum(part.numel() for _, part in parts) != math.prod(size):
        raise ValueError(f"{name} is not whole: its shards do not fill the shape {tuple(size)}")
    whole = parts[0][1].new_empty(size)
    for offset, part in parts:
        view = whole
        for dim, (start, length) in enumerate(zip(offset or (0,) * part.ndim, part.shape, strict=True)):
            view = view.narrow(dim, start, length)
        view.copy_(part)
    return whole


def _put(saved: dict[Any, Any], path: tuple[Any, ...], value: Any) -> None:
    for key in path[:-1]:
        saved = saved.setdefault(key, {})
    saved[path[-1]] = value


def _with_lists(value: Any) -> Any:
    """Return dicts whose keys are all whole numbers as the lists that they were."""
    if not isinstance(value, Mapping) or not value:
        return value
    values = {key: _with_lists(entry) for key, entry in value.items()}
    if all(isinstance(key, int) for key in values):
        return [values[key] for key in sorted(values)]
    return values
