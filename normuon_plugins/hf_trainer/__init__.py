"""NorMuon with the Hugging Face Trainer: ``register_normuon``, then ``TrainingArguments(optim="normuon")``."""

from normuon_plugins.extras import require

require("transformers", extra="hf")

from normuon_plugins.hf_trainer.registration import register_normuon, unregister_normuon  # noqa: E402  (as above)

__all__ = ["register_normuon", "unregister_normuon"]
