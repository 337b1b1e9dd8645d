"""NorMuon with the Hugging Face Trainer: ``register_normuon``, then ``TrainingArguments(optim="normuon")``."""

from normuon_plugins.extras import require

require("transformers", extra="hf")

# after the message for a missing extra
from normuon_plugins.hf_trainer.diagnostics import NorMuonDiagnostics  # noqa: E402
from normuon_plugins.hf_trainer.factory import NorMuonFactory  # noqa: E402
from normuon_plugins.hf_trainer.metrics import NorMuonMetrics  # noqa: E402
from normuon_plugins.hf_trainer.registration import register_normuon, unregister_normuon  # noqa: E402

__all__ = ["NorMuonDiagnostics", "NorMuonFactory", "NorMuonMetrics", "register_normuon", "unregister_normuon"]
