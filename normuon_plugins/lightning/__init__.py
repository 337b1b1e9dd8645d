"""NorMuon with PyTorch Lightning (``configure_normuon``, two callbacks) and Fabric (``setup_normuon``)."""

from normuon_plugins.extras import require

require("lightning", extra="lightning")

from normuon_plugins.lightning.configure import configure_normuon  # noqa: E402  (after the message for a missing extra)
from normuon_plugins.lightning.diagnostics import NorMuonDiagnostics  # noqa: E402
from normuon_plugins.lightning.fabric import setup_normuon  # noqa: E402
from normuon_plugins.lightning.metrics import NorMuonMetrics  # noqa: E402

__all__ = ["NorMuonDiagnostics", "NorMuonMetrics", "configure_normuon", "setup_normuon"]
