"""What a rule says of a parameter."""

from __future__ import annotations

from typing import NamedTuple


class Decision(NamedTuple):
    """What a rule says of a parameter.

    Attributes:
        layout: Layout string of a matrix parameter; None means AdamW.
        reason: One phrase for the table.
        decay: Whether weight decay applies to it.
    """

    layout: str | None
    reason: str
    decay: bool = True
