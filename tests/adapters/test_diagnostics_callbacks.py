"""Reports every k steps from the frameworks' own training loops, and on from where a resumed run stands."""

import json
import shutil
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from lightning.fabric import Fabric
from torch.utils.data import DataLoader
from transformers import Trainer

from normuon_plugins.accelerate import prepare_normuon
from normuon_plugins.diagnostics import diagnose, read_checkpoint, watch
from normuon_plugins.hf_trainer import NorMuonDiagnostics as TrainerDiagnostics
from normuon_plugins.hf_trainer import register_normuon, unregister_normuon
from normuon_plugins.lightning import NorMuonDiagnostics, setup_normuon
from tests.adapters.training import (
    GLOBAL_BATCH,
    examples,
    float64_llama,
    lightning_module,
    lightning_trainer,
    trainer_arguments,
)
from tests.models import tiny_llama

MATCH = r"layers\.0\.mlp"


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def names(file):
    return {matrix["name"] for matrix in json.loads(file.read_text())["matrices"]}


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_lightning_writes_reports_and_a_resumed_run_goes_on_counting(tmp_path):
    def fit(**options):
        callback = NorMuonDiagnostics(every=2, match=MATCH, suffix=".json")
        trainer = lightning_trainer(tmp_path, callbacks=[callback], **options)
        return trainer, lightning_module(float64_llama()), DataLoader(examples(), GLOBAL_BATCH)

    trainer, module, loader = fit(max_steps=3)
    trainer.fit(module, loader)
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    assert files(tmp_path / "diagnostics") == ["step-000002.json"]
    trainer, module, loader = fit(max_steps=6)
    trainer.fit(module, loader, ckpt_path=tmp_path / "saved.ckpt")
    assert files(tmp_path / "diagnostics") == ["step-000002.json", "step-000004.json", "step-000006.json"]
    assert len(names(tmp_path / "diagnostics" / "step-000004.json")) == 3
    assert shown(read_checkpoint(tmp_path / "saved.ckpt")) == shown(read_checkpoint(tmp_path)) != {}


def test_lightning_lets_go_of_the_optimizer(tmp_path):
    trainer = lightning_trainer(tmp_path, callbacks=[NorMuonDiagnostics(every=1, suffix=".json")], max_steps=2)
    trainer.fit(lightning_module(float64_llama()), DataLoader(examples(), GLOBAL_BATCH))
    trainer.optimizers[0].step()
    assert files(tmp_path / "diagnostics") == ["step-000001.json", "step-000002.json"]


def test_trainer_writes_reports_and_a_resumed_run_goes_on_counting(tmp_path):
    register_normuon()

    def trainer(**changes):
        made = Trainer(model=tiny_llama(), args=trainer_arguments(tmp_path, **changes), train_dataset=examples())
        made.add_callback(TrainerDiagnostics(every=2, match=MATCH, suffix=".json"))
        return made

    try:
        trainer(max_steps=3, save_strategy="steps", save_steps=3).train()
        assert files(tmp_path / "diagnostics") == ["step-000002.json"]
        trainer(max_steps=4).train(resume_from_checkpoint=True)
    finally:
        unregister_normuon()
    assert files(tmp_path / "diagnostics") == ["step-000002.json", "step-000004.json"]
    assert len(names(tmp_path / "diagnostics" / "step-000004.json")) == 3
    assert len(shown(read_checkpoint(tmp_path / "checkpoint-3"))) == 14


def test_trainer_with_another_optimizer_is_refused(tmp_path):
    trainer = Trainer(
        model=tiny_llama(), args=trainer_arguments(tmp_path, optim="adamw_torch"), train_dataset=examples()
    )
    trainer.add_callback(TrainerDiagnostics(every=2))
    with pytest.raises(TypeError, match="AdamW"):
        trainer.train()


def step(model, optimizer):
    batch = torch.stack([example["input_ids"] for example in examples()[:4]])
    model(input_ids=batch, labels=batch).loss.backward()
    optimizer.step()


def test_wrapped_optimizers_are_watched(tmp_path):
    """Accelerate's wrapper and Fabric's: both keep the optimizer as ``.optimizer``."""
    fabric, accelerator = Fabric(accelerator="cpu", devices=1), Accelerator(cpu=True)
    for name, (model, optimizer) in {
        "accelerate": prepare_normuon(accelerator, tiny_llama(), lr=1e-3),
        "fabric": setup_normuon(fabric, tiny_llama(), lr=1e-3),
    }.items():
        watch(optimizer, every=1, folder=tmp_path / name, match=MATCH, suffix=".json")
        step(model, optimizer)
        assert files(tmp_path / name) == ["step-000001.json"]
        assert len(diagnose(optimizer, match=MATCH).matrices) == 3
        (accelerator.save_state if name == "accelerate" else partial(save_fabric, fabric, optimizer))(
            tmp_path / "saved"
        )
        assert shown(read_checkpoint(tmp_path / "saved")) == shown(diagnose(optimizer))
        shutil.rmtree(tmp_path / "saved")


def save_fabric(fabric, optimizer, folder):
    fabric.save(folder / "state.ckpt", {"optimizer": optimizer, "step": 1})


def shown(diagnosis):
    return {matrix.name: matrix.to_dict() for matrix in diagnosis.matrices}
