"""Both learning rates and the metrics of the optimizer in the Trainer's log, in TensorBoard as in log_history."""

import pytest
import torch
from transformers import Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.trainer import DEFAULT_CALLBACKS

from normuon_plugins.hf_trainer import NorMuonFactory, NorMuonMetrics, register_normuon, unregister_normuon
from tests.adapters.training import OPTIONS, STEPS, examples, trainer_arguments
from tests.models import tiny_llama

RATE = "adamw_learning_rate"


class Spy(TrainerCallback):
    """Asks the optimizer itself, after each step and before the schedule moves on."""

    def __init__(self):
        self.metrics = []

    def on_optimizer_step(self, args, state, control, optimizer, **references):
        self.metrics.append(optimizer.optimizer.metrics(synchronize=True))


@pytest.fixture(autouse=True)
def _registered():
    register_normuon()
    yield
    unregister_normuon()


def train(folder, *callbacks, **changes):
    trainer = Trainer(model=tiny_llama(), args=trainer_arguments(folder, **changes), train_dataset=examples())
    for callback in callbacks:
        trainer.add_callback(callback(trainer))
    trainer.train()
    return trainer


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """A run that reports to TensorBoard: the trainer, what TensorBoard read, what the optimizer itself said."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path_factory.mktemp("reported")
    register_normuon()
    spy = Spy()
    trainer = train(folder, NorMuonMetrics, lambda trainer: spy, report_to="tensorboard")
    (events,) = folder.glob("runs/*/events*")
    board = EventAccumulator(str(events)).Reload()
    scalars = {tag: [event.value for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]}
    return trainer, scalars, spy.metrics


def test_both_learning_rates_are_those_of_adamw_torch_with_the_same_schedule(reported, tmp_path):
    trainer, _, _ = reported
    for key, rate in (("learning_rate", OPTIONS["lr"]), (RATE, OPTIONS["adamw_lr"])):
        theirs = train(tmp_path, optim="adamw_torch", optim_args=None, learning_rate=rate)
        assert logged(trainer, key) == pytest.approx(logged(theirs, "learning_rate"), rel=1e-12)
    assert len(set(logged(trainer, RATE))) > 3


def test_tensorboard_shows_both_learning_rates(reported):
    trainer, scalars, _ = reported
    for key in ("learning_rate", RATE):
        assert scalars[f"train/{key}"] == pytest.approx(logged(trainer, key))


def test_the_rates_stand_in_one_entry_with_the_loss(reported):
    trainer, _, _ = reported
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == STEPS
    assert all({"learning_rate", RATE} <= entry.keys() for entry in entries)


def test_metrics_in_the_log_are_those_of_the_optimizer_at_that_step(reported):
    trainer, _, expected = reported
    entries = [entry for entry in trainer.state.log_history if "normuon/update_rms" in entry]
    assert [{key: entry[key] for key in expected[0]} for entry in entries] == expected
    assert [entry["step"] for entry in entries] == list(range(1, STEPS + 1))


def test_tensorboard_shows_every_metric(reported):
    _, scalars, expected = reported
    for key in expected[0]:
        assert scalars[f"train/{key}"] == pytest.approx([metrics[key] for metrics in expected])


def test_the_rate_is_added_before_anything_reports(reported):
    names = [type(callback).__name__ for callback in reported[0].callback_handler.callbacks]
    assert names.index("AdamWLearningRate") < names.index(TensorBoardCallback.__name__)


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"logging_steps": 4}, [4]),
        ({"logging_steps": 4, "logging_first_step": True}, [1, 4]),
        ({"logging_strategy": "epoch"}, [6]),
    ],
    ids=["steps", "first step", "epoch"],
)
def test_metrics_follow_the_logging_steps(tmp_path, changes, steps):
    history = train(tmp_path, NorMuonMetrics, **changes).state.log_history
    assert [entry["step"] for entry in history if "normuon/update_rms" in entry] == steps
    assert [entry["step"] for entry in history if "loss" in entry] == steps


def test_another_optimizer_logs_nothing_of_ours(tmp_path):
    trainer = train(tmp_path, optim="adamw_torch", optim_args=None)
    assert logged(trainer, "learning_rate")
    assert not logged(trainer, RATE)


def test_a_model_without_adamw_parameters_has_one_rate(tmp_path):
    class Matrix(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Linear(16, 16, bias=False)

        def forward(self, input_ids, labels):
            return {"loss": self.weight(input_ids.float()).square().mean()}

    factory = (NorMuonFactory, {"lr": 0.01, "overrides": {"weight": "normuon"}})
    arguments = trainer_arguments(tmp_path, optim="adamw_torch", optim_args=None)
    trainer = Trainer(model=Matrix(), args=arguments, train_dataset=examples(), optimizer_cls_and_kwargs=factory)
    trainer.train()
    assert max(logged(trainer, "learning_rate")) == 0.01
    assert not logged(trainer, RATE)


def test_metrics_refuse_another_optimizer_before_the_first_step(tmp_path):
    with pytest.raises(TypeError, match=r"the trainer's optimizer is AdamW\. Use TrainingArguments\(optim='normuon'\)"):
        train(tmp_path, NorMuonMetrics, optim="adamw_torch", optim_args=None)


def test_metrics_refuse_anything_but_a_trainer(tmp_path):
    with pytest.raises(TypeError, match=r"the trainer itself, not a TrainingArguments: trainer\.add_callback"):
        NorMuonMetrics(trainer_arguments(tmp_path))


def test_registering_adds_one_default_callback_and_unregistering_takes_it_back():
    register_normuon()
    assert [kind.__name__ for kind in DEFAULT_CALLBACKS].count("AdamWLearningRate") == 1
    for _ in range(2):
        unregister_normuon()
        assert [kind.__name__ for kind in DEFAULT_CALLBACKS] == ["DefaultFlowCallback"]
