"""LightningCLI in both ways: the section ``optimizer`` of NorMuonCLI, and an OptimizerCallable in the module."""

import csv
import inspect
import sys

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningCLI, OptimizerCallable
from lightning_cli import ByteModel, FileBytes
from lightning_cli import main as run_example
from torch import nn
from torch.utils.data import DataLoader

from normuon_plugins import NorMuon, plan_parameters
from normuon_plugins.lightning import configure_normuon
from normuon_plugins.lightning.cli import NorMuonCLI, PlannedNorMuon
from tests.models import max_difference

# lightning 2.6 calls methods of jsonargparse that 4.49 deprecated
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")

TRAINER = {"max_steps": 3, "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
TRAINER |= {"enable_progress_bar": False, "enable_model_summary": False}
SHORT = [f"--trainer.{name}={value}" for name, value in TRAINER.items()]


@pytest.fixture(autouse=True)
def _command_line(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["train.py"])  # LightningCLI warns where both it and args= are given
    monkeypatch.chdir(tmp_path)


class TinyModel(LightningModule):
    """Layers that exist from the start, or only from configure_model on."""

    def __init__(self, late: bool = False):
        super().__init__()
        self.layers = None
        if not late:
            self.configure_model()

    def configure_model(self):
        if self.layers is None:
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))

    def train_dataloader(self):
        return DataLoader(torch.randn(12, 6, generator=torch.Generator().manual_seed(1)), 4)

    def training_step(self, batch, batch_idx):
        return self.layers(batch).square().mean()


class ModelWithOptimizer(TinyModel):
    """No default for the optimizer: from AdamW, jsonargparse would keep the weight decay when another is chosen."""

    def __init__(self, optimizer: OptimizerCallable):
        super().__init__()
        self.optimizer = optimizer

    def configure_optimizers(self):
        return self.optimizer(plan_parameters(self).param_groups())


def command(kind, model, *arguments):
    return kind(model, run=False, save_config_callback=None, args=[*SHORT, *arguments])


def fit(cli):
    cli.trainer.fit(cli.model)
    return cli.trainer.optimizers[0]


def trained_by_hand(**options):
    """The same run without LightningCLI."""
    from lightning.pytorch import Trainer

    model = TinyModel()
    model.configure_optimizers = lambda: configure_normuon(model, **options)
    Trainer(**TRAINER).fit(model)
    return model


def test_the_example_learns_with_the_options_of_its_file(root, tmp_path):
    cli = run_example(["fit", "--config", str(root / "examples" / "lightning_cli.yaml")])
    optimizer = cli.trainer.optimizers[0]
    assert {group["name"]: group["initial_lr"] for group in optimizer.param_groups} == {
        "normuon_o_i": 5e-3,
        "adamw": 2e-3,
        "adamw_no_decay": 2e-3,
    }
    with open(tmp_path / "runs" / "lightning_cli" / "version_0" / "metrics.csv") as file:
        written = list(csv.DictReader(file))
    losses = [float(row["training_loss"]) for row in written if row["training_loss"]]
    assert losses[-1] < losses[0] < 5.6  # ln(256) = 5.545 before training
    assert len([row for row in written if row["normuon/update_rms"]]) == 4  # twenty steps, logged every five


def test_the_command_line_goes_over_the_file(root):
    arguments = ["fit", "--config", str(root / "examples" / "lightning_cli.yaml"), *SHORT]
    arguments += [
        "--optimizer.lr=0.5",
        "--optimizer.scheduler=null",
        "--optimizer.warmup=0",
        "--trainer.callbacks=null",
    ]
    optimizer = run_example(arguments).trainer.optimizers[0]
    assert optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("late", [False, True])
def test_the_section_optimizer_trains_as_configure_normuon_does(late):
    options = {"lr": 0.05, "adamw_lr": 0.01, "scheduler": "cosine", "warmup": 1, "nesterov": True}
    cli = command(NorMuonCLI, TinyModel, f"--model.late={late}", *[f"--optimizer.{k}={v}" for k, v in options.items()])
    fit(cli)
    assert max_difference(cli.model, trained_by_hand(**options)) == 0


def test_options_of_every_type_arrive():
    arguments = ["--optimizer.ns_coefficients=[3.4, -4.7, 2.0]", "--optimizer.adamw_betas=[0.8, 0.9]"]
    arguments += ["--optimizer.ns_dtype=float64", '--optimizer.overrides={"layers.0": "adamw"}']
    matrices, rest, biases = fit(command(NorMuonCLI, TinyModel, *arguments)).param_groups
    assert matrices["ns_coefficients"] == (3.4, -4.7, 2.0)
    assert matrices["ns_dtype"] == "float64"
    assert rest["param_names"] == ["layers.0.weight"]
    assert biases["betas"] == (0.8, 0.9)


def test_the_section_optimizer_has_every_option():
    section = command(NorMuonCLI, TinyModel).config.optimizer
    functions = (configure_normuon, plan_parameters, NorMuon)
    known = [name for function in functions for name in inspect.signature(function).parameters]
    assert set(vars(section)) == set(known) - {"module", "model", "params", "options"}


def test_defaults_of_the_plan_are_those_of_plan_parameters():
    def defaults(function):
        return {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}

    plan = {name: default for name, default in defaults(plan_parameters).items() if name != "model"}
    plan["include_frozen"] = True  # as at every front door: a run may thaw what is frozen now
    assert {name: defaults(PlannedNorMuon)[name] for name in plan} == plan


def test_an_option_that_is_not_known_is_refused(capsys):
    with pytest.raises(SystemExit):
        command(NorMuonCLI, TinyModel, "--optimizer.learning_rate=0.1")
    assert "learning_rate" in capsys.readouterr().err


def test_a_scheduler_of_lightning_is_refused_with_the_way_that_works():
    with pytest.raises(ValueError, match=r"goes in by optimizer\.scheduler and optimizer\.warmup, not by lr_scheduler"):
        command(NorMuonCLI, TinyModel, "--lr_scheduler=StepLR", "--lr_scheduler.step_size=3")


def test_an_optimizer_callable_trains_on_planned_groups():
    """The class's own default is the paper's size of a step; the file may choose the other."""
    arguments = ["--model.optimizer=normuon_plugins.NorMuon", "--model.optimizer.lr=0.05"]
    for chosen, rule in (([], "match_rms_adamw"), (["match_progress_adamw"], "match_progress_adamw")):
        words = [f"--model.optimizer.adjust_lr_fn={word}" for word in chosen]
        cli = command(LightningCLI, ModelWithOptimizer, *arguments, *words)
        assert isinstance(fit(cli), NorMuon)
        assert max_difference(cli.model, trained_by_hand(lr=0.05, adjust_lr_fn=rule)) == 0


def test_an_optimizer_callable_takes_any_other_optimizer_on_the_same_groups():
    optimizer = fit(command(LightningCLI, ModelWithOptimizer, "--model.optimizer=torch.optim.SGD"))
    assert isinstance(optimizer, torch.optim.SGD)
    assert [group["name"] for group in optimizer.param_groups] == ["normuon_o_i", "adamw_no_decay"]


def test_normuon_on_the_bare_parameters_of_a_model_is_refused():
    with pytest.raises(ValueError, match=r"NorMuon needs matrices.*let build_normuon\(model\) build all groups"):
        command(LightningCLI, TinyModel, "--optimizer=normuon_plugins.NorMuon")


def test_sizes_and_data_come_from_the_file():
    module, data = ByteModel(width=32, layers=1), FileBytes(length=16, batch_size=3)
    assert module.model.config.hidden_size == 32
    assert next(iter(data.train_dataloader())).shape == (3, 16)
