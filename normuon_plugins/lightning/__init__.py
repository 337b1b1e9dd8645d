"""NorMuon with PyTorch Lightning: ``configure_normuon``."""

from normuon_plugins.extras import require

require("lightning", extra="lightning")

from normuon_plugins.lightning.configure import configure_normuon  # noqa: E402  (after the message for a missing extra)

__all__ = ["configure_normuon"]
