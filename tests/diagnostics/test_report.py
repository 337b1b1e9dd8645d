"""The files that a diagnosis becomes: one self-contained page, a picture, numbers; and the hook that writes them."""

import json
import re
from html.parser import HTMLParser

import pytest
import torch

from normuon_plugins import NorMuon, build_normuon
from normuon_plugins.diagnostics import diagnose, read_checkpoint, watch, write_report
from normuon_plugins.diagnostics.report import reading
from tests.models import tiny_llama, token_blocks


class Page(HTMLParser):
    """Collects what a page loads and shows."""

    def __init__(self, text):
        super().__init__()
        self.sources, self.text, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        self.sources += [value for key, value in attrs if key in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def train(optimizer, model, steps=2):
    for step in range(steps):
        batch = torch.stack([block["input_ids"] for block in token_blocks(4, seed=step)])
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(scope="module")
def diagnosis():
    model = tiny_llama()
    optimizer = build_normuon(model)
    train(optimizer, model)
    return diagnose(optimizer)


def test_page_is_one_file_with_every_layer_and_matrix(diagnosis, tmp_path):
    page = Page(write_report(diagnosis, tmp_path / "new" / "report.html", title="a <b> title").read_text())
    assert not page.open
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert len(page.sources) == 2 + 2  # overview and all layers, then each of the two
    shown = " ".join(page.text)
    assert "a <b> title" in shown
    assert all(matrix.name in shown for matrix in diagnosis.matrices)
    assert all(sentence in shown for sentence in reading(diagnosis))


def test_picture_is_a_picture(diagnosis, tmp_path):
    from matplotlib.image import imread

    height, width, _ = imread(write_report(diagnosis, tmp_path / "report.png")).shape
    assert width > 500
    assert height > width / 2


def test_numbers_are_for_machines(diagnosis, tmp_path):
    read = json.loads(write_report(diagnosis, tmp_path / "report.json").read_text())
    names = [matrix["name"] for matrix in read["matrices"]]
    assert names == [matrix.name for matrix in diagnosis.matrices]
    assert read["matrices"][0]["muon"]["condition_number"] == pytest.approx(
        diagnosis.matrices[0].stages["muon"].condition_number
    )


def test_reading_says_the_numbers(diagnosis):
    sentences = reading(diagnosis)
    spreads = sorted(matrix.stages["normuon"].neuron_spread for matrix in diagnosis.matrices)
    (sentence,) = [each for each in sentences if each.startswith("NorMuon's direction")]
    assert f"{spreads[-1]:.0%} at most" in sentence
    neurons = sum(matrix.shape[0] for matrix in diagnosis.matrices)
    assert any(re.match(rf"\d+ of {neurons} neurons are dead", each) for each in sentences)


@pytest.mark.parametrize("name", ["report.pdf", "report"])
def test_other_files_are_refused_before_anything_is_computed(diagnosis, name, tmp_path):
    with pytest.raises(ValueError, match=r"name it \.html, \.png, \.json"):
        write_report(diagnosis, tmp_path / name)


def test_two_matrices_of_one_name_are_both_in_the_report(tmp_path):
    weights = [torch.nn.Parameter(torch.eye(3)), torch.nn.Parameter(torch.eye(4))]
    unnamed = NorMuon([{"params": [weight]} for weight in weights])
    of_two_models = NorMuon([{"params": [("0.weight", weight)]} for weight in weights])
    for optimizer, name in ((unnamed, "parameter 0 of its group"), (of_two_models, "0.weight")):
        for weight in weights:
            weight.grad = torch.rand_like(weight)
        optimizer.step()
        torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
        shown = [(matrix.name, matrix.shape) for matrix in diagnose(optimizer).matrices]
        assert shown == [(name, (3, 3)), (f"{name} (2)", (4, 4))]
        saved = [matrix.name for matrix in read_checkpoint(tmp_path).matrices]
        assert saved == (["0.weight", "0.weight (2)"] if name == "0.weight" else ["parameter 0", "parameter 1"])
        page = write_report(diagnose(optimizer), tmp_path / "report.json").read_text()
        assert f"{name} (2)" in page


def test_names_with_torchs_wrappers_have_a_match_without_them():
    model = torch.compile(tiny_llama(), backend="eager")
    optimizer = build_normuon(model)
    train(optimizer, model)
    found = diagnose(optimizer, match=r"^model\.layers\.0\.mlp\.up_proj").matrices
    assert [matrix.name for matrix in found] == ["_orig_mod.model.layers.0.mlp.up_proj.weight"]


def test_watch_writes_every_so_many_steps_and_ends(tmp_path):
    model = tiny_llama()
    optimizer = build_normuon(model)
    handle = watch(optimizer, every=2, folder=tmp_path, first_step=7, match="mlp", suffix=".json")
    train(optimizer, model, 4)
    handle.remove()
    train(optimizer, model, 4)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["step-000008.json", "step-000010.json"]
    names = [matrix["name"] for matrix in json.loads((tmp_path / files[0]).read_text())["matrices"]]
    assert len(names) == 6
    assert all("mlp" in name for name in names)


def test_watch_refuses_what_would_fail_after_hours():
    optimizer = build_normuon(tiny_llama())
    with pytest.raises(ValueError, match="every=0"):
        watch(optimizer, every=0)
    with pytest.raises(ValueError, match="name it"):
        watch(optimizer, every=1, suffix=".svg")
