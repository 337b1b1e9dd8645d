"""The learning-rate finder: both rates of NorMuon, searched for on the user's own model and data.

``find_learning_rates(model, batches)`` trains short runs from the model's weights, puts the weights back, and returns a
``LearningRates`` that prints, draws and saves itself. ``normuon tune`` is the same from the command line.
"""

from normuon_plugins.tuning.finder import find_learning_rates
from normuon_plugins.tuning.grid import Trial
from normuon_plugins.tuning.result import LearningRates

__all__ = ["LearningRates", "Trial", "find_learning_rates"]
