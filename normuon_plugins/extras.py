"""The message for a framework that is not installed."""

from __future__ import annotations

from importlib.util import find_spec


def require(package: str, *, extra: str) -> None:
    """Raise ``ImportError`` with the command that installs ``package``, unless it is there. Imports nothing.

    Args:
        package: Import name.
        extra: The extra of normuon-plugins that brings it.
    """
    if find_spec(package) is None:
        raise ImportError(f'{package} is not installed; run: pip install "normuon-plugins[{extra}]"')
