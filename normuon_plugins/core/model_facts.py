"""What a model says of its own modules: which are embeddings, which are output heads, who owns each parameter.

Duck typing only: transformers is never imported. ``get_input_embeddings`` may raise and may return a module that is no
``nn.Embedding``; ``get_output_embeddings`` is None for classifiers; ties are found by identity, since
``_tied_weights_keys`` is set even where nothing is tied.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

from torch import Tensor, nn

from normuon_plugins.core.expert_facts import ExpertFacts
from normuon_plugins.core.names import WRAPPERS, unwrapped_module

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# What models without further conventions call their last layer; ``fc`` only at the root (torchvision).
_HEAD_NAME = re.compile(r"(\w+_)?(heads?|classifier|score|logits)(_\w+)?")
_ROOT_HEAD_NAME = re.compile(r"fc|output|output_projection|to_logits|unembed\w*")
# What wraps a whole model calls it: DataParallel, LightningModules, PEFT.
_WRAPPERS = {"module", "model", "base_model"}
# Projections of one attention head each, not heads of a model (Funnel).
_NO_HEAD_NAME = re.compile(r"(q|k|v|post|multi|attn|attention)_heads?")


class Owner(NamedTuple):
    """A place where a parameter hangs in the module tree.

    Attributes:
        name: FQN of the parameter through this place.
        module: The module that holds it.
        attribute: Its name there, such as ``"weight"``.
        ancestors: The modules above ``module``, the nearest first. A copy that PEFT trains in a module's place
            (``modules_to_save``) stands where the original does, and a layer that it adapts (``base_layer``) where it
            stood before: what wraps them is left out, and so is what torch wraps around a module.
        path: The name of ``module`` in the first of them, the name of that in the second, ...
    """

    name: str
    module: nn.Module
    attribute: str
    ancestors: tuple[nn.Module, ...]
    path: tuple[str, ...]

    def places(self) -> list[tuple[nn.Module | None, str]]:
        """Return what the layer of this parameter is called, and by whom; a raw parameter, what it is called itself.

        A wrapper around a single weight (a convolution with its norm) passes for its layer: then there are two places,
        the nearer first.
        """
        if self.attribute != "weight" or not self.ancestors:
            return [(self.module, self.attribute)]
        above = list(zip(self.ancestors, self.path, strict=True))
        nearest = above[0][0]
        single = len(list(islice((weight for weight in nearest.parameters() if weight.ndim >= 2), 2))) == 1
        return [(holder, name) for holder, name in above[: 2 if single else 1]]


class ModelFacts:
    """The module tree of one model, asked once.

    Args:
        model: Any module; it may wrap Hugging Face models at any depth.
    """

    def __init__(self, model: nn.Module) -> None:
        self.owners: dict[Tensor, list[Owner]] = {}
        for prefix, module, ancestors, path in _walk(model):
            for attribute, parameter in module.named_parameters(recurse=False):
                owner = Owner(f"{prefix}{attribute}", module, attribute, ancestors, path)
                self.owners.setdefault(parameter, []).append(owner)
        layers = _repeated_layers(model)
        self._embeddings = _parts(_asked(model, "get_input_embeddings"))
        self._heads = _output_heads(model, layers)
        ends = [part for part in model.modules() if _is_output_layer(part) or isinstance(part, TRANSPOSED_CONVOLUTIONS)]
        last = ends[-1] if ends and not self._heads else None
        self._possible_head = None if last in layers else last
        self._patch_sizes = _patch_sizes(model)
        self.experts = ExpertFacts()

    def is_embedding(self, module: nn.Module) -> bool:
        """Return whether ``module`` is an embedding, or part of what the model calls its input embeddings."""
        return isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or module in self._embeddings

    def is_head(self, module: nn.Module) -> bool:
        """Return whether ``module`` is an output head."""
        return module in self._heads

    def may_be_head(self, module: nn.Module) -> bool:
        """Return whether ``module`` is the last layer of a model that says nothing of its output head."""
        return module is self._possible_head

    def reads_patches(self, owner: Owner) -> bool:
        """Return whether a Linear called an embedding has as many inputs as an image patch has numbers.

        The number alone says nothing: a patch of 16 x 16 RGB pixels has 768, as many as a hidden state of ViT.
        """
        is_called_so = any("embed" in name for _, name in owner.places())
        return is_called_so and getattr(owner.module, "in_features", None) in self._patch_sizes


def is_linear(module: nn.Module) -> bool:
    """Return whether ``module`` is a Linear, or says that it is one by its sizes."""
    if isinstance(module, nn.Linear):
        return True
    sizes = (getattr(module, "out_features", None), getattr(module, "in_features", None))
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim == 2 and tuple(weight.shape) == sizes


def _parts(modules: Iterator[nn.Module]) -> set[nn.Module]:
    return {part for module in modules for part in module.modules()}


def _repeated_layers(model: nn.Module) -> set[nn.Module]:
    """Return all modules inside lists of layers: elements with two or more weight matrices each."""
    inside: set[nn.Module] = set()
    for container in model.modules():
        if not isinstance(container, (nn.ModuleList, nn.Sequential)):
            continue
        for layer in container.children():
            if layer not in inside and _count_matrices(layer) > 1:
                inside |= set(layer.modules())
    return inside


def _count_matrices(module: nn.Module) -> int:
    """Return how many layers with a weight matrix ``module`` has; one that PEFT copies or adapts is one."""
    inner = module._modules.get("original_module" if _copies(module) else "base_layer")
    if inner is not None:
        return _count_matrices(inner)
    own = any(parameter is not None and parameter.ndim >= 2 for parameter in module._parameters.values())
    return own + sum(_count_matrices(child) for child in module.children() if child is not module)


def _output_heads(model: nn.Module, layers: set[nn.Module]) -> set[nn.Module]:
    """Return the output projections.

    These are what the model names so, every Linear outside its base model, projections to the widths that its config
    gives to labels or to a shared space, and what is called a head; never a layer of a stack, which may have such a
    width or stand outside the base model (a codec, a decoder) and is trunk all the same.
    """
    heads = _parts(_asked(model, "get_output_embeddings")) | _parts(_asked(model, "get_classifier"))  # the second: timm
    for module in model.modules():
        prefix = getattr(module, "base_model_prefix", None)
        if isinstance(prefix, str):  # a Hugging Face model
            heads |= _heads_beside_the_base(module, prefix) - layers
    heads |= _vocabulary_heads(model) - layers
    for _, module, _, path in _walk(model):
        if path and module not in layers and _is_output_layer(module) and _is_called_head(path):
            heads.add(module)
    return heads


def _is_called_head(path: tuple[str, ...]) -> bool:
    """Return whether a layer is called a head, or stands in a Sequential of that name."""
    name = next((name for name in path if not name.isdigit()), "")
    at_root = set(path[1:]) <= _WRAPPERS
    return bool(_HEAD_NAME.fullmatch(name) and not _NO_HEAD_NAME.fullmatch(name)) or (
        at_root and _ROOT_HEAD_NAME.fullmatch(path[0]) is not None
    )


def _is_output_layer(module: nn.Module) -> bool:
    return is_linear(module) or isinstance(module, CONVOLUTIONS)


def _heads_beside_the_base(module: nn.Module, prefix: str) -> set[nn.Module]:
    heads: set[nn.Module] = set()
    base = module._modules.get(prefix)
    if base is not None:
        trunk = set(base.modules())
        for other in module.modules():  # further models inside this one have heads of their own
            if other is not module and other is not base and isinstance(getattr(other, "base_model_prefix", None), str):
                trunk |= set(other.modules())
        heads |= {part for part in module.modules() if is_linear(part) and part not in trunk}
    config = getattr(module, "config", None)
    labels, shared = getattr(config, "num_labels", None), getattr(config, "projection_dim", None)
    heads |= {part for part in module.modules() if is_linear(part) and part.out_features == labels}
    children = [
        unwrapped_module(part)
        for child in map(unwrapped_module, module.children())
        for part in (_copies(child) or {"": child}).values()
    ]
    return heads | {part for part in children if is_linear(part) and part.out_features == shared}


def _vocabulary_heads(model: nn.Module) -> set[nn.Module]:
    """Return every Linear that mirrors an embedding: from its width to its number of entries.

    Not inside a list of layers, where a matrix may have that shape by chance.
    """
    tables = {
        (module.num_embeddings, module.embedding_dim) for module in model.modules() if isinstance(module, nn.Embedding)
    }
    return {
        module
        for path, module in model.named_modules()
        if is_linear(module)
        and (module.out_features, module.in_features) in tables
        and not any(part.isdigit() for part in path.split("."))
    }


def _patch_sizes(model: nn.Module) -> set[int]:
    """Return how many numbers an image patch has, by each config in the model."""
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    sizes = set()
    for config in configs.values():
        patch, channels = getattr(config, "patch_size", None), getattr(config, "num_channels", None)
        if isinstance(patch, int) and isinstance(channels, int) and patch > 1:
            sizes.add(patch * patch * channels)
    return sizes


def _walk(
    module: nn.Module, prefix: str = "", ancestors: tuple[nn.Module, ...] = (), path: tuple[str, ...] = ()
) -> Iterator[tuple[str, nn.Module, tuple[nn.Module, ...], tuple[str, ...]]]:
    """Yield every place in the tree, shared modules at each of their places, once around any cycle."""
    yield prefix, module, ancestors, path
    if copies := _copies(module):
        for name, copy in copies.items():
            yield from _walk(copy, f"{prefix}{name}.", ancestors, path)
        return
    for name, child in module._modules.items():
        if child is not None and (name == "base_layer" or name in WRAPPERS):
            yield from _walk(child, f"{prefix}{name}.", ancestors, path)
        elif child is not None and child is not module and child not in ancestors:
            yield from _walk(child, f"{prefix}{name}.", (module, *ancestors), (name, *path))


def _copies(module: nn.Module) -> dict[str, nn.Module]:
    """Return the original and its copies by their names, of PEFT's ``ModulesToSaveWrapper``; else nothing."""
    original, copies = module._modules.get("original_module"), module._modules.get("modules_to_save")
    if original is None or not isinstance(copies, nn.ModuleDict):
        return {}
    return {"original_module": original} | {f"modules_to_save.{name}": copy for name, copy in copies.items()}


def _asked(model: nn.Module, method: str) -> Iterator[nn.Module]:
    """Yield what ``method()`` answers for every module that has it."""
    for module in model.modules():
        ask = getattr(module, method, None)
        if not callable(ask):
            continue
        try:
            answer = ask()
        except Exception:  # transformers raises where there is none, and a user's method may want arguments
            continue
        if isinstance(answer, nn.Module):
            yield answer
