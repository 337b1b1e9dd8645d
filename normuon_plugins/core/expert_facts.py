"""How many experts a module of a mixture may hold, and which of its weights are theirs."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from normuon_plugins.core.names import unwrapped_module

# What modules of mixtures call their number of experts.
EXPERT_COUNTS = ("num_experts", "n_routed_experts", "num_local_experts")
# What they call the stacked weights into and out of the experts' hidden layer; torchtitan follows Llama's w1, w2, w3.
EXPERT_INPUTS = ("gate_up_proj", "up_proj", "gate_proj", "w1")
EXPERT_OUTPUTS = ("down_proj", "w2")


class ExpertFacts:
    """Each module of one model, asked once: a router among hundreds of layers asks all of them, and so does each."""

    def __init__(self) -> None:
        self._counts: dict[nn.Module, frozenset[int]] = {}
        self._children: dict[nn.Module, dict[int, list[tuple[str, nn.Module]]]] = {}

    def counts(self, module: nn.Module) -> frozenset[int]:
        """Return the numbers of experts that ``module`` may hold."""
        if module not in self._counts:
            self._counts[module] = frozenset(expert_counts(module))
        return self._counts[module]

    def children(self, parent: nn.Module) -> Mapping[int, list[tuple[str, nn.Module]]]:
        """Return the children of ``parent``, without torch's wrappers and with their names, by each of their counts."""
        if parent not in self._children:
            by_count: dict[int, list[tuple[str, nn.Module]]] = {}
            for name, child in parent.named_children():
                module = unwrapped_module(child)
                for count in self.counts(module):
                    by_count.setdefault(count, []).append((name, module))
            self._children[parent] = by_count
        return self._children[parent]


def expert_counts(module: nn.Module) -> set[int]:
    """Return the numbers of experts that ``module`` may hold: as an attribute, as a collection, as stacked weights."""
    counts = {stack.shape[0] for stack in expert_pair(module) if stack is not None}
    counts |= {getattr(module, name) for name in EXPERT_COUNTS if isinstance(getattr(module, name, None), int)}
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        counts.add(len(module))
    return counts


def expert_pair(module: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """Return the stacked weights into and out of the experts' hidden layer, where a module holds both."""
    stacks = {name: weight for name, weight in module.named_parameters(recurse=False) if weight.ndim == 3}
    up = next((stacks[name] for name in EXPERT_INPUTS if name in stacks), None)
    return up, next((stacks[name] for name in EXPERT_OUTPUTS if name in stacks), None)
