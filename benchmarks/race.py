"""All contenders in one process: steps in turn, then what each one's numbers are beside the others'."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from accuracy import Oracle, choose, measure_accuracy
from contenders import NS_STEPS, Contender
from entrants import Entrant, Tensors
from measure import PlainProducts, dense_multiplications, describe, interleave, needed_multiplications, quartiles
from rich.console import Console
from rich.progress import track
from shapes import Shape, matrices

from normuon_plugins.core.orthogonalize import fast_matmul_dtype

Item = TypeVar("Item")

MATMUL = "matmul"
# AdamW keeps two float32 numbers for every entry.
ADAMW_BYTES = 8


def race(
    contenders: Sequence[Contender],
    shapes: tuple[Shape, ...],
    dtype: torch.dtype,
    device: torch.device,
    repetitions: int,
) -> dict[str, Any]:
    """Return what was measured of every contender: ``contenders``, ``failed``, ``absent``, ``matmul``."""
    sizes = matrices(shapes)
    present = {contender.name: contender for contender in contenders if not contender.is_absent}
    entrants, failed = _enter(present, shapes, dtype, device)
    products = PlainProducts(sizes, NS_STEPS, fast_matmul_dtype(device), device)
    runs = {MATMUL: products, **{name: entrant.timed_step for name, entrant in entrants.items()}}
    times, broken = interleave(runs, _show_progress(range(repetitions), "repetitions"))
    failed |= broken
    matmul = _describe_matmul(times.pop(MATMUL), products.dtype, sizes)
    oracles = [Oracle(size) for size in choose(sizes)]
    rows = []
    for name, seconds in _show_progress(times.items(), "accuracy"):
        try:
            accuracy = measure_accuracy(present[name], oracles, dtype, device)
        except Exception as error:  # a peer may raise anything, and the others are still measured
            failed[name] = describe(error)
        else:
            rows.append(_describe_entrant(entrants[name], seconds, accuracy, sizes))
    _compare(rows, dense_multiplications(sizes, NS_STEPS), matmul["flops"])
    absent = {contender.name: contender.module for contender in contenders if contender.is_absent}
    return {"contenders": rows, "failed": failed, "absent": absent, "matmul": matmul}


def _show_progress(items: Iterable[Item], what: str) -> Iterable[Item]:
    """Yield the items, with a bar on standard error."""
    yield from track(list(items), what, console=Console(stderr=True))


def _enter(
    contenders: Mapping[str, Contender], shapes: tuple[Shape, ...], dtype: torch.dtype, device: torch.device
) -> tuple[dict[str, Entrant], dict[str, str]]:
    """Return every contender after two steps, and the errors of those that raised."""
    shared: dict[torch.dtype, Tensors] = {}
    entrants: dict[str, Entrant] = {}
    failed: dict[str, str] = {}
    for name, contender in _show_progress(contenders.items(), "first steps"):
        own = contender.dtype or dtype
        if own not in shared:
            shared[own] = Tensors(shapes, own, device)
        try:
            entrants[name] = Entrant(contender, shared[own])
        except Exception as error:  # as above
            failed[name] = describe(error)
    return entrants, failed


def _describe_matmul(times: list[float], dtype: torch.dtype, sizes: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Return the rate of the plain products."""
    _, median, _ = quartiles(times)
    flops = 2 * dense_multiplications(sizes, NS_STEPS) / median
    return {"dtype": str(dtype).removeprefix("torch."), "seconds": times, "median": median, "flops": flops}


def _describe_entrant(
    entrant: Entrant, times: list[float], accuracy: list[dict[str, Any]], sizes: Sequence[tuple[int, int]]
) -> dict[str, Any]:
    """Return what was measured of one contender alone."""
    low, middle, high = quartiles(times)
    entries = sum(parameter.numel() for parameter in entrant.parameters)
    contender, device = entrant.contender, entrant.tensors.device
    needed = needed_multiplications(sizes, NS_STEPS, contender.ns_coefficients, device) if contender.ours else None
    return {
        "name": contender.name,
        "ours": contender.ours,
        "orthogonalizes": contender.orthogonalizes,
        "note": contender.note,
        "needed_multiplications": needed,
        "seconds": times,
        "lower_quartile": low,
        "median": middle,
        "upper_quartile": high,
        "state_bytes": entrant.state_bytes,
        "state_per_parameter_byte": entrant.state_bytes / entrant.parameter_bytes,
        "state_ratio_to_adamw": entrant.state_bytes / (ADAMW_BYTES * entries),
        "transient_bytes": entrant.transient_bytes,
        "accuracy": accuracy,
    }


def _compare(rows: list[dict[str, Any]], dense: int, matmul_flops: float) -> None:
    """Add ratios and rates to the rows (modified in place)."""
    peers = [row["median"] for row in rows if row["orthogonalizes"] and not row["ours"]]
    for row in rows:
        needed = row["needed_multiplications"]
        row["ratio_to_fastest_peer"] = row["median"] / min(peers) if peers else None
        row["dense_flops"] = 2 * dense / row["median"] if row["orthogonalizes"] else None
        row["needed_flops"] = 2 * needed / row["median"] if needed else None
        known = row["needed_flops"] or row["dense_flops"]
        row["fraction_of_matmul"] = known / matmul_flops if known else None
