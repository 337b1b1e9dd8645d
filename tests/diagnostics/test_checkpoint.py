"""A report from a checkpoint, as every framework lays it out, against the live optimizer that wrote it."""

import warnings
from collections import OrderedDict

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

from normuon_plugins import build_normuon
from normuon_plugins.cli import main
from normuon_plugins.diagnostics import diagnose, read_checkpoint
from tests.diagnostics.test_report import train
from tests.models import tiny_llama

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


@pytest.fixture(scope="module")
def trained():
    """A model and its optimizer after two steps, and what it shows."""
    model = tiny_llama()
    optimizer = build_normuon(model)
    train(optimizer, model)
    return model, optimizer, diagnose(optimizer)


def save_dcp(state, folder):
    with warnings.catch_warnings():  # that there is one process
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=folder, no_dist=True)


# name -> a function that writes a checkpoint of (model, optimizer) to a path
FORMS = {
    "state dict": lambda model, optimizer, path: torch.save(optimizer.state_dict(), path),
    "beside a model": lambda model, optimizer, path: torch.save(
        {"model": model.state_dict(), "step": 3, "optimizer": optimizer.state_dict()}, path
    ),
    "lightning": lambda model, optimizer, path: torch.save(
        {"state_dict": model.state_dict(), "optimizer_states": [optimizer.state_dict()]}, path
    ),
    "trainer": lambda model, optimizer, path: (path.mkdir(), torch.save(optimizer.state_dict(), path / "optimizer.pt")),
    "accelerate": lambda model, optimizer, path: (
        path.mkdir(),
        torch.save(OrderedDict(optimizer.state_dict()), path / "optimizer.bin"),
    ),
    "by name": lambda model, optimizer, path: torch.save(get_optimizer_state_dict(model, optimizer), path),
    "dcp": lambda model, optimizer, path: save_dcp({"optimizer": get_optimizer_state_dict(model, optimizer)}, path),
    "dcp, flattened": lambda model, optimizer, path: save_dcp(
        {"optimizer": get_optimizer_state_dict(model, optimizer, options=FLAT)}, path
    ),
    "accelerate, sharded": lambda model, optimizer, path: save_dcp(
        {"optimizer": get_optimizer_state_dict(model, optimizer)}, path / "optimizer_0"
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_checkpoint_shows_what_the_live_optimizer_shows(form, trained, tmp_path):
    model, optimizer, live = trained
    FORMS[form](model, optimizer, tmp_path / "checkpoint")
    found = read_checkpoint(tmp_path / "checkpoint")
    expected = {matrix.name: matrix for matrix in live.matrices}
    assert {matrix.name for matrix in found.matrices} == expected.keys()
    for matrix in found.matrices:
        assert matrix.to_dict() == expected[matrix.name].to_dict()


def test_command_line_writes_the_report_and_says_what_it_shows(trained, tmp_path, capsys):
    _, optimizer, _ = trained
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    report = tmp_path / "report.html"
    assert main(["diagnose", str(tmp_path), "--out", str(report), "--match", "layers.1.mlp"]) == 0
    said = capsys.readouterr().out
    assert "NorMuon's direction: the median condition number is" in said
    assert str(report) in said
    text = report.read_text()
    assert "layers.1.mlp.up_proj" in text
    assert "layers.0" not in text


def test_momentum_in_int8_is_read_from_a_checkpoint(tmp_path):
    model = tiny_llama()
    optimizer = build_normuon(model, momentum_dtype="int8")
    train(optimizer, model)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    live = {matrix.name: matrix.to_dict() for matrix in diagnose(optimizer).matrices}
    assert {matrix.name: matrix.to_dict() for matrix in read_checkpoint(tmp_path).matrices} == live


MISTAKES = {
    "nothing there": (lambda folder: None, "no such file or folder"),
    "no optimizer": (lambda folder: (folder.mkdir(), (folder / "config.json").touch()), "no optimizer state"),
    "a model": (lambda folder: torch.save({"weight": torch.zeros(2, 2)}, folder), "no dict with 'state'"),
    "another optimizer": (
        lambda folder: torch.save(torch.optim.SGD([torch.zeros(2, 2)]).state_dict(), folder),
        "another optimizer wrote it",
    ),
    "not torch's": (lambda folder: folder.write_text("not a checkpoint"), "torch cannot read"),
    "with code": (lambda folder: torch.save({"call": print}, folder), "--no-weights-only"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_ends_with_one_sentence(mistake, tmp_path, capsys):
    write, words = MISTAKES[mistake]
    write(tmp_path / "checkpoint")
    assert main(["diagnose", str(tmp_path / "checkpoint"), "--out", str(tmp_path / "report.json")]) == 1
    said = capsys.readouterr().err.strip()
    assert words in said
    assert said.startswith("normuon diagnose: error: ")
    assert not (tmp_path / "report.json").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--match", "nothing_like_it"], "matches none of the 14 matrix parameters"),
        (["--match", "("], "unterminated"),
        (["--out", "report.pdf"], "name it .html"),
    ],
)
def test_wrong_options_end_with_one_sentence(arguments, words, trained, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(trained[1].state_dict(), "optimizer.pt")
    assert main(["diagnose", "optimizer.pt", *arguments]) == 1
    assert words in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["optimizer.pt"]
