"""The numbers: singular values and neuron norms of one matrix at each stage of the step."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from normuon_plugins.core.group_options import NS_DTYPES
from normuon_plugins.core.layout import Layout, parse_layout
from normuon_plugins.core.orthogonalize import orthogonalize
from normuon_plugins.core.step_size import MATCH_PROGRESS, largest_rms, spread
from normuon_plugins.core.update_rules import Progress, normuon_direction

# The three stages of a step, as the paper's Figure 1 compares them.
STAGES = ("momentum", "muon", "normuon")
# A neuron is dead below this share of the root mean square of its matrix's neuron norms, and dominant above that
# multiple. Ours: a hundredth moves a weight a hundred times slower than its neighbours.
DEAD, DOMINANT = 0.01, 3.0
# Below this share of the largest, a singular value found in float32 is rounding: it counts as zero for the rank.
RANK_TOLERANCE = 1e-6
# Independent matrices of one parameter (experts, heads) that are looked at, unless the caller says otherwise.
PER_PARAMETER = 4

Orthogonalize = Callable[[Tensor], Tensor]
# [start, stop) ranges for every dimension, see Layout.block_boxes.
Box = tuple[tuple[tuple[int, int], ...], ...]


@dataclass(frozen=True)
class Stage:
    """A matrix at one stage.

    Attributes:
        singular_values: Descending, shape ``(min(rows, cols),)``, float32.
        neuron_norms: Euclidean norm of each row, shape ``(rows,)``, float32.
    """

    singular_values: Tensor
    neuron_norms: Tensor

    @property
    def condition_number(self) -> float:
        """Largest over smallest singular value; infinite where the smallest is zero to rounding."""
        largest, smallest = float(self.singular_values[0]), float(self.singular_values[-1])
        return largest / smallest if smallest > RANK_TOLERANCE * largest else math.inf

    @property
    def rank(self) -> int:
        """How many singular values are more than rounding."""
        return int((self.singular_values > RANK_TOLERANCE * self.singular_values[0]).sum())

    @property
    def stable_rank(self) -> float:
        """Sum of squared singular values over the largest squared: how many directions carry the update."""
        return float((self.singular_values / self.singular_values[0]).square().sum())

    @property
    def neuron_spread(self) -> float:
        """Standard deviation over mean of the neuron norms."""
        return float(self.neuron_norms.std(correction=0) / self.neuron_norms.mean())

    @property
    def dead(self) -> int:
        """Neurons whose norm is below ``DEAD`` times the root mean square of all."""
        return int((self.neuron_norms < DEAD * self._typical).sum())

    @property
    def dominant(self) -> int:
        """Neurons whose norm is above ``DOMINANT`` times the root mean square of all."""
        return int((self.neuron_norms > DOMINANT * self._typical).sum())

    @property
    def _typical(self) -> Tensor:
        return self.neuron_norms.square().mean().sqrt()

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers of the tables, without the distributions; an infinite one is None, as JSON wants."""
        names = ("condition_number", "rank", "stable_rank", "neuron_spread", "dead", "dominant")
        numbers = {name: getattr(self, name) for name in names}
        return {name: value if math.isfinite(value) else None for name, value in numbers.items()}


@dataclass(frozen=True)
class MatrixDiagnosis:
    """One matrix.

    Attributes:
        name: FQN of its parameter; ``[block 1]`` and ``[matrix 3]`` where that holds several.
        shape: Neurons and inputs.
        stages: ``momentum``, ``muon`` and ``normuon`` in this order; without ``normuon`` where the neuron step is off,
            without any where momentum is zero or not finite.
        trouble: Why there is no stage; else empty.
    """

    name: str
    shape: tuple[int, int]
    stages: Mapping[str, Stage]
    trouble: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return names and numbers, without the distributions."""
        stages = {name: stage.to_dict() for name, stage in self.stages.items()}
        return {"name": self.name, "shape": list(self.shape), "trouble": self.trouble, **stages}


@dataclass(frozen=True)
class Diagnosis:
    """The matrices of a model at one moment.

    Attributes:
        source: Where they came from, in words.
        matrices: In the order of the optimizer's groups.
        notes: What a reader of the numbers should know, in sentences.
    """

    source: str
    matrices: Sequence[MatrixDiagnosis]
    notes: Sequence[str] = field(default_factory=tuple)

    def to_dict(self) -> dict[str, Any]:
        """Return all numbers of the tables, for machines."""
        matrices = [matrix.to_dict() for matrix in self.matrices]
        return {"source": self.source, "notes": list(self.notes), "matrices": matrices}


def with_distinct_names(matrices: Iterable[MatrixDiagnosis]) -> list[MatrixDiagnosis]:
    """Return ``matrices``, the second of one name called ``"name (2)"``: groups and pipeline stages may share names."""
    count: Counter[str] = Counter()
    distinct = []
    for matrix in matrices:
        count[matrix.name] += 1
        number = count[matrix.name]
        distinct.append(replace(matrix, name=f"{matrix.name} ({number})") if number > 1 else matrix)
    return distinct


def shows_the_same(matrix: MatrixDiagnosis, other: MatrixDiagnosis) -> bool:
    """Return whether two matrices have the same numbers at each stage, up to rounding."""
    if (matrix.shape, matrix.trouble, matrix.stages.keys()) != (other.shape, other.trouble, other.stages.keys()):
        return False
    pairs = [(matrix.stages[stage], other.stages[stage]) for stage in matrix.stages]
    return all(
        torch.allclose(one, two, rtol=1e-3, atol=1e-3 * float(one.max()))
        for here, there in pairs
        for one, two in (
            (here.singular_values, there.singular_values),
            (here.neuron_norms, there.neuron_norms),
        )
    )


def newton_schulz_of(group: Mapping[str, Any]) -> Orthogonalize:
    """Return the orthogonalization that a group's options describe."""
    dtype = None if group.get("ns_dtype") is None else NS_DTYPES[str(group["ns_dtype"]).removeprefix("torch.")]
    coefficients, steps = group["ns_coefficients"], group["ns_steps"]
    return lambda update: orthogonalize(update, ns_coefficients=coefficients, ns_steps=steps, ns_dtype=dtype)


def diagnose_parameter(
    name: str,
    momentum: Tensor,
    second_momentum: Tensor,
    group: Mapping[str, Any],
    *,
    gradient_mean_square: Tensor | None = None,
    look_ahead: Tensor | None = None,
    orthogonalize_fn: Orthogonalize | None = None,
    per_parameter: int = PER_PARAMETER,
) -> Iterator[MatrixDiagnosis]:
    """Yield the matrices of one parameter, evenly spaced where it holds more than ``per_parameter``.

    What is looked at is the last step: it orthogonalized this momentum (or ``look_ahead``), and its neuron step ended
    with this ``second_momentum``, which is not advanced again.

    Args:
        name: FQN.
        momentum: Whole, shape of the parameter, floating point. Not modified.
        second_momentum: Whole, with 1 for every input dimension. Not modified.
        group: Its options; ``layout`` says what its matrices are.
        gradient_mean_square: Whole, one value per matrix; what ``match_progress_adamw`` keeps.
        look_ahead: What was orthogonalized under ``nesterov=True``, like ``momentum``; None takes that.
        orthogonalize_fn: In place of Newton-Schulz.
        per_parameter: At most so many matrices.
    """
    layout = parse_layout(group["layout"])
    shape, neuron_shape = tuple(momentum.shape), layout.neuron_state_shape(momentum.shape)
    update = momentum if look_ahead is None else look_ahead
    if gradient_mean_square is None:  # nobody reads it then
        gradient_mean_square = momentum.new_zeros(layout.matrix_state_shape(shape))
    sizes = layout.matrix_shapes(shape)
    boxes = (layout.block_boxes(shape), layout.block_boxes(neuron_shape), layout.matrix_state_boxes(shape))
    places = [(block, index) for block, (count, _, _) in enumerate(sizes) for index in range(count)]
    several_blocks, several = len(sizes) > 1, any(count > 1 for count, _, _ in sizes)
    for block, chosen in groupby(_evenly(places, per_parameter), key=itemgetter(0)):
        label = name + (f" [block {block}]" if several_blocks else "")
        count, rows, cols = sizes[block]
        box, neuron_box, matrix_box = (of_kind[block] for of_kind in boxes)
        stack = (
            _stack(momentum, box, layout, (count, rows, cols)),
            _stack(update, box, layout, (count, rows, cols)),
            _stack(second_momentum, neuron_box, layout, (count, rows, 1)),
            _stack(gradient_mean_square, matrix_box, layout, (count, 1, 1)),
        )
        for _, index in chosen:
            matrix, orthogonalized, neurons, mean_square = (tensors[index] for tensors in stack)
            each = label + (f" [matrix {index}]" if several else "")
            yield diagnose_matrix(each, matrix, orthogonalized, neurons, group, orthogonalize_fn, mean_square)


def diagnose_matrix(
    name: str,
    momentum: Tensor,
    update: Tensor,
    second_momentum: Tensor,
    group: Mapping[str, Any],
    orthogonalize_fn: Orthogonalize | None = None,
    gradient_mean_square: Tensor | None = None,
) -> MatrixDiagnosis:
    """Return what each stage of the step does to one matrix.

    Args:
        name: For the report.
        momentum: Shape ``(rows, cols)``.
        update: What was orthogonalized: ``momentum`` or its look-ahead.
        second_momentum: Shape ``(rows, 1)``.
        group: Options.
        orthogonalize_fn: In place of Newton-Schulz.
        gradient_mean_square: One number; what ``match_progress_adamw`` keeps.
    """
    rows, cols = momentum.shape
    if not bool(torch.isfinite(momentum).all() & torch.isfinite(update).all()):
        return MatrixDiagnosis(name, (rows, cols), {}, "momentum holds NaN or infinity")
    if not bool(momentum.any() and update.any()):
        return MatrixDiagnosis(name, (rows, cols), {}, "momentum is zero: this matrix never had a gradient")
    stages = {"momentum": _stage(_scaled(momentum))}
    progress = None
    if group["adjust_lr_fn"] == MATCH_PROGRESS and gradient_mean_square is not None:
        # in the units of the scaled update
        mean_square = gradient_mean_square.float().view(1, 1, 1) / update.abs().max().float().square()
        largest = spread([(1, largest_rms(group["lr"], rows, cols))], mean_square).view_as(mean_square)
        progress = Progress(_scaled(update)[None], mean_square, largest)
    for stage, normalize in (("muon", False), ("normuon", group["normalize_neurons"])):
        if stage == "normuon" and not (normalize and bool(second_momentum.any())):
            continue
        found = normuon_direction(
            _scaled(update)[None],
            second_momentum[None].float().clone(),
            orthogonalize=orthogonalize_fn or newton_schulz_of(group),
            normalize=normalize,
            beta2=1.0,  # leaves the second moment as the last step left it
            eps=group["eps"],
            adjust_lr_fn=group["adjust_lr_fn"],
            progress=progress,
        )
        stages[stage] = _stage(found.direction[0].float())
    return MatrixDiagnosis(name, (rows, cols), stages)


def _scaled(matrix: Tensor) -> Tensor:
    """Return a copy whose largest entry is 1, in float32: squared, a gradient of 1e-30 would be zero."""
    return matrix.float() / matrix.abs().max()


def _stage(matrix: Tensor) -> Stage:
    return Stage(torch.linalg.svdvals(matrix).cpu(), torch.linalg.vector_norm(matrix, dim=1).cpu())


def _stack(tensor: Tensor, box: Box, layout: Layout, sizes: tuple[int, ...]) -> Tensor:
    """Return one fused block of a whole tensor as a batch of matrices, shape ``sizes``."""
    for dim, intervals in enumerate(box):
        if intervals != ((0, tensor.shape[dim]),):
            tensor = torch.cat([tensor.narrow(dim, start, stop - start) for start, stop in intervals], dim)
    matrices = tensor.new_empty(sizes)
    layout.storage_view(matrices, tensor.shape).copy_(tensor)
    return matrices


def _evenly(places: Sequence[tuple[int, int]], most: int) -> list[tuple[int, int]]:
    """Return at most ``most`` of ``places``, the first and the last among them."""
    if len(places) <= most:
        return list(places)
    if most == 1:
        return [places[0]]
    return [places[round(number * (len(places) - 1) / (most - 1))] for number in range(most)]
