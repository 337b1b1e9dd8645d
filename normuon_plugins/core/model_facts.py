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

# What models without further conventions call their last layer; ``fc`` only at the root (torchvision).
_HEAD_NAME = re.compile(r"(\w+_)?(heads?|classifier|score|logits)(_\w+)?")
_ROOT_HEAD_NAME = re.compile(r"fc|output_projection|to_logits|unembed\w*")
# Projections of one attention head each, not heads of a model (Funnel).
_NO_HEAD_NAME = re.compile(r"(q|k|v|post|multi|attn|attention)_heads?")


class Owner(NamedTuple):
    """A place where a parameter hangs in the module tree.

    Attributes:
        name: FQN of the parameter through this place.
        module: The module that holds it.
        attribute: Its name there, such as ``"weight"``.
        ancestors: The modules above ``module``, the nearest first.
    """

    name: str
    module: nn.Module
    attribute: str
    ancestors: tuple[nn.Module, ...]

    def places(self) -> list[tuple[nn.Module | None, str]]:
        """Return what the layer of this parameter is called, and by whom; a raw parameter, what it is called itself.

        A wrapper around a single weight (a convolution with its norm, a copy that PEFT trains) passes for its layer:
        then there are two places, the nearer first.
        """
        if self.attribute != "weight" or not self.ancestors:
            return [(self.module, self.attribute)]
        names = self.name.split(".")[-2::-1]
        above = list(zip(self.ancestors, names, strict=False))
        if len(above) > 2 and above[1][1] == "modules_to_save":
            above = above[2:]
        elif len(above) > 1 and above[0][1] == "base_layer":
            above = above[1:]
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
        for path, module, ancestors in _walk(model):
            for attribute, parameter in module.named_parameters(recurse=False):
                owner = Owner(f"{path}{attribute}", module, attribute, ancestors)
                self.owners.setdefault(parameter, []).append(owner)
        layers = _repeated_layers(model)
        self._embeddings = _parts(_asked(model, "get_input_embeddings"))
        self._heads = _output_heads(model, layers)
        linears = [module for module in model.modules() if is_linear(module)]
        last = linears[-1] if linears and not self._heads else None
        self._possible_head = None if last in layers else last
        self._patch_sizes = _patch_sizes(model)

    def is_embedding(self, module: nn.Module) -> bool:
        """Return whether ``module`` is an embedding, or part of what the model calls its input embeddings."""
        return isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or module in self._embeddings

    def is_head(self, module: nn.Module) -> bool:
        """Return whether ``module`` is an output head."""
        return module in self._heads

    def may_be_head(self, module: nn.Module) -> bool:
        """Return whether ``module`` is the last Linear of a model that says nothing of its output head."""
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
            if layer not in inside and sum(_is_matrix_layer(part) for part in layer.modules()) > 1:
                inside |= set(layer.modules())
    return inside


def _is_matrix_layer(module: nn.Module) -> bool:
    return any(parameter is not None and parameter.ndim >= 2 for parameter in module._parameters.values())


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
    for path, module in model.named_modules():
        name = path.rpartition(".")[2]
        named = _HEAD_NAME.fullmatch(name) and not _NO_HEAD_NAME.fullmatch(name)
        if module not in layers and _is_output_layer(module) and (named or _ROOT_HEAD_NAME.fullmatch(path)):
            heads.add(module)
    return heads


def _is_output_layer(module: nn.Module) -> bool:
    return is_linear(module) or isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))


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
    return heads | {part for part in module.children() if is_linear(part) and part.out_features == shared}


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
    module: nn.Module, path: str = "", ancestors: tuple[nn.Module, ...] = ()
) -> Iterator[tuple[str, nn.Module, tuple[nn.Module, ...]]]:
    """Yield every place in the tree, shared modules at each of their places, once around any cycle."""
    yield path, module, ancestors
    for name, child in module._modules.items():
        if child is not None and child is not module and child not in ancestors:
            yield from _walk(child, f"{path}{name}.", (module, *ancestors))


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
