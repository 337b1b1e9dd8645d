"""What a model says of its own modules: which are embeddings, which are output heads, who owns each parameter.

Duck typing only: transformers is never imported. ``get_input_embeddings`` may raise and may return a module that is no
``nn.Embedding``; ``get_output_embeddings`` is None for classifiers; ties are found by identity, since
``_tied_weights_keys`` is set even where nothing is tied.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn


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
        self._embeddings = _input_embeddings(model)
        self._heads = _output_heads(model)
        linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
        self._possible_head = linears[-1] if linears and not self._heads else None

    def is_embedding(self, module: nn.Module) -> bool:
        """Return whether ``module`` is an embedding, or part of what the model calls its input embeddings."""
        return isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or module in self._embeddings

    def is_head(self, module: nn.Module) -> bool:
        """Return whether ``module`` is an output head."""
        return module in self._heads

    def may_be_head(self, module: nn.Module) -> bool:
        """Return whether ``module`` is the last Linear of a model that says nothing of its output head."""
        return module is self._possible_head


def _input_embeddings(model: nn.Module) -> set[nn.Module]:
    return {part for module in _asked(model, "get_input_embeddings") for part in module.modules()}


def _output_heads(model: nn.Module) -> set[nn.Module]:
    """Return the output projections: what the model names so, and every Linear outside its base model.

    A model without a base of its own (CLIP) ends in Linear layers whose width its config names.
    """
    heads = set(_asked(model, "get_output_embeddings")) | set(_asked(model, "get_classifier"))  # the second is timm's
    for module in model.modules():
        prefix = getattr(module, "base_model_prefix", None)
        if not isinstance(prefix, str):
            continue  # not a Hugging Face model
        base = dict(module.named_children()).get(prefix)
        if base is not None:
            trunk = set(base.modules())
            heads |= {part for part in module.modules() if isinstance(part, nn.Linear) and part not in trunk}
        config = getattr(module, "config", None)
        widths = {getattr(config, "projection_dim", None), getattr(config, "num_labels", None)}
        heads |= {part for part in module.children() if isinstance(part, nn.Linear) and part.out_features in widths}
    return heads | _vocabulary_heads(model)


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
        if isinstance(module, nn.Linear)
        and (module.out_features, module.in_features) in tables
        and not any(part.isdigit() for part in path.split("."))
    }


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
