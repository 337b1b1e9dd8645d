"""A diagnosis as one file: a page for a browser, a picture, or numbers."""

from __future__ import annotations

import base64
import io
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normuon_plugins.diagnostics.spectra import DEAD, DOMINANT, STAGES, Diagnosis, MatrixDiagnosis
from normuon_plugins.extras import require

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".html", ".png", ".json")
DPI = 80
# A page shows the worst of a long list; the JSON has all.
NAMED = 5
TEMPLATE = Path(__file__).with_name("report.html.jinja")


def check_target(out: Path) -> None:
    """Raise unless ``write_report`` can write to such a file: before what takes minutes.

    Raises:
        ValueError: If the suffix is not one of ``SUFFIXES``.
        ImportError: If matplotlib or Jinja is missing.
    """
    if out.suffix not in SUFFIXES:
        raise ValueError(f"{out}: a report is a page, a picture or numbers; name it {', '.join(SUFFIXES)}.")
    if out.suffix != ".json":
        require("matplotlib", extra="diagnostics")
    if out.suffix == ".html":
        require("jinja2", extra="diagnostics")


def write_report(diagnosis: Diagnosis, out: str | Path, *, title: str = "") -> Path:
    """Write one self-contained file; an existing one is replaced when the new one is complete.

    Args:
        diagnosis: What to show.
        out: ``.html``: a page with tables, pictures of every layer and matrix, and a short reading. ``.png``: the
            overview and one row per layer. ``.json``: the numbers of the tables. Folders are created.
        title: Heading; the source of the diagnosis if empty.

    Returns:
        The file.

    Raises:
        ValueError: If the suffix is none of these.
        ImportError: If matplotlib or Jinja is missing.
    """
    out = Path(out)
    check_target(out)
    title = title or f"NorMuon: {diagnosis.source}"
    if out.suffix == ".json":
        content = json.dumps(diagnosis.to_dict(), indent=1).encode()
    elif out.suffix == ".png":
        content = _picture(diagnosis)
    else:
        content = _page(diagnosis, title).encode()
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    partial.write_bytes(content)
    os.replace(partial, out)
    return out


def reading(diagnosis: Diagnosis) -> list[str]:
    """Return what these numbers say, in sentences that hold for them alone."""
    shown = [matrix for matrix in diagnosis.matrices if matrix.stages]
    sentences = []
    for stage, words in (
        ("momentum", "raw momentum"),
        ("muon", "Muon's direction"),
        ("normuon", "NorMuon's direction"),
    ):
        stages = [matrix.stages[stage] for matrix in shown if stage in matrix.stages]
        if not stages:
            continue
        conditions = sorted(found.condition_number for found in stages)
        median = conditions[len(conditions) // 2]
        deficient = sum(math.isinf(condition) for condition in conditions)
        spreads = sorted(found.neuron_spread for found in stages)
        sentences.append(
            f"{words[0].upper()}{words[1:]}: the median condition number is {_number(median)}"
            + (f" ({deficient} of {len(stages)} matrices have no full rank)" if deficient else "")
            + f"; the neuron norms of a matrix spread by {spreads[len(spreads) // 2]:.0%} of their mean (median),"
            f" {spreads[-1]:.0%} at most."
        )
    for kind, stage, words in (
        ("dead", "momentum", f"dead (gradients below {DEAD:g} of the matrix's typical neuron)"),
        ("dominant", "momentum", f"dominant (gradients above {DOMINANT:g} times the typical neuron)"),
        ("dominant", "normuon", f"dominant in the NorMuon direction (above {DOMINANT:g} times the typical neuron)"),
    ):
        sentences.append(_count(shown, kind, stage, words))
    troubled = [f"{matrix.name} ({matrix.trouble})" for matrix in diagnosis.matrices if matrix.trouble]
    if troubled:
        sentences.append(f"Left out: {_some(troubled)}.")
    return [sentence for sentence in sentences if sentence]


def _count(shown: Sequence[MatrixDiagnosis], kind: str, stage: str, words: str) -> str:
    found = {matrix.name: getattr(matrix.stages[stage], kind) for matrix in shown if stage in matrix.stages}
    if not found:
        return ""
    total = sum(matrix.shape[0] for matrix in shown if stage in matrix.stages)
    count = sum(found.values())
    worst = sorted((name for name in found if found[name]), key=lambda name: -found[name])
    where = f", most in {_some([f'{name} ({found[name]})' for name in worst])}" if worst else ""
    return f"{count} of {total} neurons are {words}{where}."


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def _number(value: float) -> str:
    """Return three digits, without an exponent where there is room."""
    if math.isinf(value):
        return "infinite"
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}" if value < 1e6 else f"{value:.1e}"


def _page(diagnosis: Diagnosis, title: str) -> str:
    from jinja2 import Environment

    from normuon_plugins.diagnostics import figures

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = _number
    groups: list[dict[str, Any]] = [
        {"name": name, "matrices": matrices, "picture": _data_url(figures.of_layer(matrices))}
        for name, matrices in figures.layers(diagnosis).items()
    ]
    return environment.from_string(TEMPLATE.read_text()).render(
        title=title,
        diagnosis=diagnosis,
        reading=reading(diagnosis),
        overview=_data_url(figures.overview(diagnosis)),
        by_layer=_data_url(figures.by_layer(diagnosis)),
        layers=groups,
        stages=STAGES,
        labels=figures.LABELS,
        dead=DEAD,
        dominant=DOMINANT,
    )


def _picture(diagnosis: Diagnosis) -> bytes:
    """Return overview and layers, one above the other."""
    from matplotlib.image import imread

    from normuon_plugins.diagnostics import figures

    parts = [imread(io.BytesIO(_png(figure))) for figure in (figures.overview(diagnosis), figures.by_layer(diagnosis))]
    heights = [part.shape[0] for part in parts]
    figure = figures.new_figure(parts[0].shape[1] / DPI, sum(heights) / DPI)
    figure.set_layout_engine("none")
    bottom = 1.0
    for part, height in zip(parts, heights, strict=True):
        bottom -= height / sum(heights)
        axes = figure.add_axes((0, bottom, 1, height / sum(heights)))
        axes.imshow(part, aspect="auto")
        axes.axis("off")
    return _png(figure)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def _data_url(figure: Figure) -> str:
    return "data:image/png;base64," + base64.b64encode(_png(figure)).decode()
