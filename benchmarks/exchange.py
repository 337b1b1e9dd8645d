"""What one step sends between ranks under FSDP2, beside a design that gathers every matrix on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shapes import Shape, entries

from normuon_plugins import plan_exchange

# In both designs matrices travel in bfloat16.
BYTES_PER_ENTRY = 2


def measure_exchange(shapes: tuple[Shape, ...], ranks: Sequence[int], ns_steps: int) -> list[dict[str, Any]]:
    """Return one record for each number of ranks, of the busiest rank and one step."""
    rows = [(shape, "e o i" if len(shape) == 3 else "o i") for shape in shapes]
    found = []
    for count in ranks:
        report = plan_exchange(rows, shards=count, ns_steps=ns_steps)
        found.append(
            {
                "ranks": count,
                "bytes_sent": max(report.bytes_sent),
                "bytes_received": max(report.bytes_received),
                "collectives": report.collectives,
                "multiplications": max(report.multiplications),
                "all_gather_bytes_received": round(BYTES_PER_ENTRY * entries(shapes) * (1 - 1 / count)),
                "all_gather_multiplications": sum(report.multiplications),
            }
        )
    return found
