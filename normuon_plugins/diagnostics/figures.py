"""The pictures of a report, by matplotlib."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from normuon_plugins.diagnostics.spectra import STAGES, Diagnosis, MatrixDiagnosis, Stage

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {"momentum": "tab:gray", "muon": "tab:blue", "normuon": "tab:orange"}
LABELS = {"momentum": "momentum", "muon": "Muon direction", "normuon": "NorMuon direction"}
# Points of a curve: more than a picture has pixels for.
POINTS = 200
# Below this share of the typical value a curve leaves the picture: zeros have no place on a logarithmic axis.
FLOOR = 1e-5


def layers(diagnosis: Diagnosis) -> dict[str, list[MatrixDiagnosis]]:
    """Return the matrices by layer: the name up to its first number; those without a number together."""
    found: dict[str, list[MatrixDiagnosis]] = {}
    for matrix in diagnosis.matrices:
        found.setdefault(layer_of(matrix), []).append(matrix)
    return found


def layer_of(matrix: MatrixDiagnosis) -> str:
    """Return the name of a matrix's layer.

    Example:
        >>> layer_of(MatrixDiagnosis("model.layers.3.mlp.up_proj.weight", (4, 4), {}))
        'model.layers.3'
    """
    numbered = re.match(r"(?:.*?\.)?\d+(?=\.)", matrix.name)
    return numbered[0] if numbered else "outside numbered layers"


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure that belongs to no window and no global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def overview(diagnosis: Diagnosis) -> Figure:
    """Draw condition number and neuron spread of every matrix, in the order of the model."""
    shown = [matrix for matrix in diagnosis.matrices if matrix.stages]
    starts: dict[str, int] = {}
    for place, matrix in enumerate(shown):
        starts.setdefault(layer_of(matrix), place)
    figure = new_figure(11, 6.5)
    conditions, spreads = figure.subplots(2, 1, sharex=True)
    for stage in STAGES:
        places = [place for place, matrix in enumerate(shown) if stage in matrix.stages]
        stages = [shown[place].stages[stage] for place in places]
        style = {"marker": ".", "linewidth": 0.8, "color": COLORS[stage], "label": LABELS[stage]}
        # infinite condition numbers leave gaps
        heights = [found.condition_number if math.isfinite(found.condition_number) else math.nan for found in stages]
        conditions.plot(places, heights, **style)
        spreads.plot(places, [found.neuron_spread for found in stages], **style)
    conditions.set_yscale("log")
    conditions.set_ylabel("condition number")
    conditions.set_title(
        "largest over smallest singular value; matrices without full rank are left out", fontsize="small"
    )
    spreads.set_ylabel("neuron spread")
    spreads.set_title("standard deviation over mean of the neuron norms", fontsize="small")
    spreads.set_ylim(bottom=0)
    spreads.set_xticks(list(starts.values()), list(starts), rotation=90 if len(starts) > 8 else 0, fontsize="x-small")
    spreads.set_xlabel("matrices in the order of the model")
    conditions.legend(fontsize="small")
    return figure


def by_layer(diagnosis: Diagnosis) -> Figure:
    """Draw the distributions of every layer, over all its matrices: singular values and neuron norms."""
    rows = {name: _pooled(group) for name, group in layers(diagnosis).items()}
    return _rows({name: pooled for name, pooled in rows.items() if pooled})


def of_layer(matrices: Sequence[MatrixDiagnosis]) -> Figure:
    """Draw the distributions of each matrix of one layer."""
    return _rows(
        {
            f"{matrix.name.removeprefix(layer_of(matrix) + '.')}\n{matrix.shape[0]} x {matrix.shape[1]}": {
                name: (_relative(stage.singular_values), _relative(stage.neuron_norms))
                for name, stage in matrix.stages.items()
            }
            for matrix in matrices
            if matrix.stages
        }
    )


def _pooled(matrices: Sequence[MatrixDiagnosis]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return for every stage the relative singular values and neuron norms of several matrices together."""
    pooled = {}
    for name in STAGES:
        stages: list[Stage] = [matrix.stages[name] for matrix in matrices if name in matrix.stages]
        if stages:
            pooled[name] = (
                torch.cat([_relative(stage.singular_values) for stage in stages]),
                torch.cat([_relative(stage.neuron_norms) for stage in stages]),
            )
    return pooled


def _relative(values: Tensor) -> Tensor:
    """Return values by their root mean square, so that matrices of all sizes are drawn on one axis."""
    return values / values.square().mean().sqrt()


def _rows(rows: Mapping[str, Mapping[str, tuple[Tensor, Tensor]]]) -> Figure:
    """Draw a row of two axes for every entry."""
    figure = new_figure(11, 0.7 + 2.1 * max(1, len(rows)))
    if not rows:
        return figure
    grid = figure.subplots(len(rows), 2, squeeze=False, sharex=True)
    for axes, (title, stages) in zip(grid, rows.items(), strict=True):
        for stage, (singular_values, neuron_norms) in stages.items():
            _curve(axes[0], singular_values, stage)
            _curve(axes[1], neuron_norms, stage)
        axes[0].set_yscale("log")
        axes[1].set_ylim(bottom=0)
        axes[0].set_ylabel(title, fontsize="x-small")
    grid[0][0].set_title("singular values, by their root mean square", fontsize="small")
    grid[0][1].set_title("neuron norms, by their root mean square", fontsize="small")
    grid[-1][0].set_xlabel("share of the singular values, largest first")
    grid[-1][1].set_xlabel("share of the neurons, largest first")
    grid[0][1].legend(fontsize="x-small", loc="lower left")
    return figure


def _curve(axes: Axes, values: Tensor, stage: str) -> None:
    ordered = values.sort(descending=True).values.clamp_min(FLOOR)
    count = min(POINTS, len(ordered))
    picks = torch.linspace(0, len(ordered) - 1, count, dtype=torch.float32, device=ordered.device).round().long()
    share = (picks.double() + 0.5) / len(ordered)
    axes.plot(share.tolist(), ordered[picks].tolist(), color=COLORS[stage], label=LABELS[stage], linewidth=1.2)
