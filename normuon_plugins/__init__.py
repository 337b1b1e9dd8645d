"""NorMuon for PyTorch Lightning, Accelerate and the Hugging Face Trainer."""

from normuon_plugins.core.build import build_normuon
from normuon_plugins.core.exchange_report import ExchangeReport, plan_exchange
from normuon_plugins.core.optimizer import NorMuon
from normuon_plugins.core.parameter_plan import ParameterPlan, plan_parameters

__all__ = ["ExchangeReport", "NorMuon", "ParameterPlan", "build_normuon", "plan_exchange", "plan_parameters"]
