"""NorMuonMetrics through Lightning's loggers: what is written, when, and by whom."""

import csv
import io

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from normuon_plugins import NorMuon
from normuon_plugins.lightning import NorMuonMetrics
from tests.adapters.lightning_runs import two_ranks
from tests.adapters.training import GLOBAL_BATCH, examples, float64_llama, lightning_module, lightning_trainer

NEURON_METRICS = {"normuon/update_rms", "normuon/neuron_lr_min", "normuon/neuron_lr_mean", "normuon/neuron_lr_max"}
NEURON_METRICS |= {"normuon/neuron_spread_before", "normuon/neuron_spread_after"}


def rows(text):
    """Return the numbers of each row by column, without empty cells."""
    return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(io.StringIO(text))]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Six steps, logged every two, of two accumulated batches each, into two loggers."""
    folder = tmp_path_factory.mktemp("metrics")
    loggers = [CSVLogger(folder, name="csv"), TensorBoardLogger(folder, name="tensorboard")]
    trainer = lightning_trainer(
        folder,
        logger=loggers,
        callbacks=[NorMuonMetrics(), LearningRateMonitor("step")],
        log_every_n_steps=2,
        accumulate_grad_batches=2,
    )
    trainer.fit(lightning_module(float64_llama()), DataLoader(examples(), GLOBAL_BATCH // 2))
    events = EventAccumulator(loggers[1].log_dir).Reload()
    written = rows((folder / "csv" / "version_0" / "metrics.csv").read_text())
    return [row for row in written if "normuon/lr" in row], written, events, trainer.optimizers[0]


def test_metrics_are_written_every_so_many_optimizer_steps(run):
    metrics, *_ = run
    assert [row["step"] for row in metrics] == [1, 3, 5]


def test_every_metric_is_written_and_the_last_are_those_of_the_last_step(run):
    metrics, _, _, optimizer = run
    expected = optimizer.metrics(synchronize=True)
    assert expected.keys() >= NEURON_METRICS
    assert metrics[-1].keys() == expected.keys() | {"step"}
    for name in NEURON_METRICS:
        assert metrics[-1][name] == pytest.approx(expected[name])


def test_every_logger_gets_the_same_numbers(run):
    metrics, _, events, _ = run
    for name in metrics[0].keys() - {"step"}:
        assert [event.value for event in events.Scalars(name)] == pytest.approx([row[name] for row in metrics])
        assert [event.step for event in events.Scalars(name)] == [1, 3, 5]


def test_learning_rates_are_those_of_the_step_as_lightning_logs_them(run):
    metrics, written, *_ = run
    theirs = {row["step"]: row for row in written if "lr-NorMuon/adamw" in row}
    for row in metrics:
        assert row["normuon/lr"] == theirs[row["step"]]["lr-NorMuon/normuon_o_i"]
        assert row["adamw/lr"] == theirs[row["step"]]["lr-NorMuon/adamw"]


def test_two_ranks_write_once_what_one_process_writes(run):
    metrics, *_ = run
    sharded = rows(two_ranks()[0]["metrics"])
    assert len(sharded) == len(metrics)
    for row, expected in zip(sharded, metrics, strict=True):
        assert row == pytest.approx(expected, rel=1e-5)


def test_without_a_logger_the_run_goes_on(tmp_path):
    trainer = lightning_trainer(tmp_path, callbacks=[NorMuonMetrics()], log_every_n_steps=1)
    trainer.fit(lightning_module(float64_llama()), DataLoader(examples(), GLOBAL_BATCH))
    assert trainer.global_step == 6


class TwoOptimizers(LightningModule):
    """Manual optimization with two NorMuon, or with something else."""

    def __init__(self, kind):
        super().__init__()
        self.automatic_optimization = False
        self.kind = kind
        self.halves = torch.nn.ModuleList(torch.nn.Linear(4, 4, bias=False) for _ in range(2))

    def training_step(self, batch, batch_idx):
        for half, optimizer in zip(self.halves, self.optimizers(), strict=True):
            optimizer.zero_grad()
            self.manual_backward(half(batch).square().mean())
            optimizer.step()

    def configure_optimizers(self):
        return [self.kind(half.parameters(), lr=0.1 * (1 + n)) for n, half in enumerate(self.halves)]


def fit_two(folder, kind):
    trainer = lightning_trainer(
        folder,
        callbacks=[NorMuonMetrics()],
        logger=CSVLogger(folder),
        log_every_n_steps=3,
        max_steps=12,
        gradient_clip_val=None,
    )
    trainer.fit(TwoOptimizers(kind), DataLoader(torch.randn(6, 4), 1))


def test_several_optimizers_are_told_apart_by_a_number(tmp_path):
    fit_two(tmp_path, NorMuon)
    written = rows((tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text())
    assert {(row["normuon/lr-0"], row["normuon/lr-1"]) for row in written} == {(0.1, 0.2)}
    assert len(written) == 4  # twelve steps of optimizers, logged every three


def test_a_run_without_normuon_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"found no NorMuon among the optimizers: \['SGD'\]"):
        fit_two(tmp_path, torch.optim.SGD)
