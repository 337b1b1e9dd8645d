"""NorMuon for PyTorch Lightning, Accelerate and the Hugging Face Trainer."""

from normuon_plugins.core.build import add_parameters, build_normuon
from normuon_plugins.core.exchange_report import ExchangeReport, plan_exchange
from normuon_plugins.core.optimizer import NorMuon
from normuon_plugins.core.parameter_plan import ParameterPlan, plan_parameters
from normuon_plugins.distributed.clipping import clip_grad_norm_

__all__ = [
    "ExchangeReport",
    "NorMuon",
    "ParameterPlan",
    "add_parameters",
    "build_normuon",
    "clip_grad_norm_",
    "plan_exchange",
    "plan_parameters",
]
