"""NorMuon with Accelerate: ``prepare_normuon``."""

from normuon_plugins.extras import require

require("accelerate", extra="accelerate")

from normuon_plugins.accelerate.prepare import prepare_normuon  # noqa: E402  (after the message for a missing extra)

__all__ = ["prepare_normuon"]
