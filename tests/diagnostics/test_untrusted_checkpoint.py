"""Checkpoints of strangers and broken ones: nothing that they bring runs, and each ends in one sentence."""

import io
import os
import pickle
import resource
import zipfile

import pytest
import torch

from normuon_plugins import NorMuon
from normuon_plugins.cli import main
from normuon_plugins.diagnostics import read_checkpoint
from tests.diagnostics.test_checkpoint import save_dcp


class Evil:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


def state_dict(**changes):
    """Return what a NorMuon saves of one matrix, with other entries in its group."""
    weight = torch.nn.Parameter(torch.eye(4, 3))
    optimizer = NorMuon([("weight", weight)])
    weight.grad = torch.rand(4, 3)
    optimizer.step()
    saved = optimizer.state_dict()
    saved["param_groups"][0].update(changes)
    return saved


def folder_of(path, state=None):
    save_dcp({"optimizer": state_dict() if state is None else state}, path)
    return path


def refusal(path, tmp_path, capsys):
    """Return the one sentence that the command ends with."""
    assert main(["diagnose", str(path), "--out", str(tmp_path / "report.json")]) == 1
    said = capsys.readouterr().err.strip()
    assert said.startswith("normuon diagnose: error: ")
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "report.json").exists()
    return said


def test_metadata_of_a_folder_runs_nothing(tmp_path, capsys):
    folder, ran = tmp_path / "folder", tmp_path / "ran"
    folder.mkdir()
    (folder / ".metadata").write_bytes(pickle.dumps(Evil(ran)))
    for weights_only in (True, False):  # the metadata has no need of code under either
        with pytest.raises(ValueError, match=r"\.metadata asks for \w+\.system, which no such checkpoint needs"):
            read_checkpoint(folder, weights_only=weights_only)
    assert "nothing of it was run" in refusal(folder, tmp_path, capsys)
    assert not ran.exists()


def test_classes_of_torch_in_the_metadata_are_not_called(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()

    class Loads(Evil):
        def __reduce__(self):
            return (torch.load, (self.path,))  # would say that there is no such file

    (folder / ".metadata").write_bytes(pickle.dumps(Loads(str(tmp_path / "gone"))))
    with pytest.raises(ValueError, match="'load' object has no attribute"):
        read_checkpoint(folder)


@pytest.mark.parametrize("where", ["file", "folder"])
def test_what_is_no_tensor_runs_nothing_unless_the_user_says_so(where, tmp_path, capsys):
    path, ran = tmp_path / "saved", tmp_path / "ran"
    state = state_dict(note=Evil(ran))
    torch.save(state, path) if where == "file" else folder_of(path, state)
    with pytest.raises(ValueError, match="torch cannot read"):
        read_checkpoint(path)
    assert "--no-weights-only" in refusal(path, tmp_path, capsys)
    assert not ran.exists()
    assert len(read_checkpoint(path, weights_only=False).matrices) == 1
    assert ran.exists()


def test_weights_of_the_model_beside_the_optimizer_are_not_read(tmp_path):
    save_dcp({"model": {"note": Evil(tmp_path / "ran")}, "optimizer": state_dict()}, tmp_path / "folder")
    assert len(read_checkpoint(tmp_path / "folder").matrices) == 1
    assert not (tmp_path / "ran").exists()


def nested(depth):
    """Return the pickle of a list in a list in a list, which Python's own writer cannot write."""
    return pickle.PROTO + b"\x02" + pickle.EMPTY_LIST * depth + pickle.APPEND * (depth - 1) + pickle.STOP


def doubled(depth):
    value = []
    for _ in range(depth):
        value = [value, value]
    return value


def save(value, path):
    """Write what torch.save writes of ``value``, or the archive that holds a pickle."""
    torch.save({} if isinstance(value, bytes) else value, path)
    if isinstance(value, bytes):
        with zipfile.ZipFile(path) as archive:
            entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in entries.items():
                archive.writestr(name, value if name.endswith("data.pkl") else content)


def with_state(**changes):
    saved = state_dict()
    saved["state"][0].update(changes)
    return saved


# What a file says -> words of the sentence that it ends with.
STRANGE = {
    "blocks without end": (lambda: state_dict(layout="o=1*9999999999 i"), "more than 65536 blocks"),
    "a layout of another kind": (lambda: state_dict(layout=["o", "i"]), "holds no state that a NorMuon wrote"),
    "a layout that does not fit": (lambda: state_dict(layout="o=2+1 i"), "add up to 3"),
    "steps without end": (
        lambda: state_dict(ns_steps=10**9),
        "ns_steps=1000000000 must be a whole number from 1 to 99",
    ),
    "a number for three": (lambda: state_dict(ns_coefficients=7), "ns_coefficients=7 must be"),
    "a number that is none": (lambda: state_dict(lr=10**400), "holds no state that a NorMuon wrote"),
    "lists in lists": (lambda: nested(100_000), "no dict with 'state' and 'param_groups'"),
    "a list twice in a list": (lambda: doubled(60), "no dict with 'state' and 'param_groups'"),
    "groups that are none": (lambda: {"state": 3, "param_groups": 4}, "holds no state that a NorMuon wrote"),
    "more names than parameters": (lambda: state_dict(param_names=["a", "b"]), "holds no state that a NorMuon wrote"),
    "no tensor": (lambda: with_state(momentum_buffer=3), "holds no state that a NorMuon wrote"),
    "one number for a trillion": (
        lambda: with_state(momentum_buffer=torch.zeros(1).expand(10**6, 10**6)),
        "says that it is larger than what was stored",
    ),
    "a tensor of nothing": (
        lambda: with_state(momentum_buffer=torch.zeros(10**6, 10**6, device="meta")),
        "is no plain tensor",
    ),
    "neurons of another shape": (
        lambda: with_state(second_momentum_buffer=torch.zeros(3, 1)),
        r"has shape (3, 1) and needs (4, 1)",
    ),
}


@pytest.mark.parametrize("case", STRANGE)
def test_a_strange_file_ends_in_one_sentence_and_asks_for_no_memory(case, tmp_path, capsys):
    make, words = STRANGE[case]
    save(make(), tmp_path / "saved.pt")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert words in refusal(tmp_path / "saved.pt", tmp_path, capsys)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500 * 1024  # KiB


def test_a_compressed_file_is_refused(tmp_path, capsys):
    stored = io.BytesIO()
    torch.save(state_dict(), stored)
    with zipfile.ZipFile(stored) as archive, zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as small:
        for entry in archive.infolist():
            small.writestr(entry.filename, archive.read(entry))
    assert "it is compressed" in refusal(tmp_path / "x.pt", tmp_path, capsys)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def overwrite(path):
    path.write_bytes(b"\0" * path.stat().st_size)


def point(folder, **places):
    """Let the metadata say other places of the shards; written by torch's own classes."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for place in metadata.storage_data.values():
        for name, value in places.items():
            setattr(place, name, value)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def resize(folder):
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for name, tensor in metadata.state_dict_metadata.items():
        if name.endswith("momentum_buffer"):
            tensor.size = torch.Size((10**6, 10**6))
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


# What happened to a folder -> words of the sentence that it ends with.
BROKEN = {
    "shard cut": (lambda folder: cut(folder / "__0_0.distcp"), "'__0_0.distcp' is cut short"),
    "shard overwritten": (lambda folder: overwrite(folder / "__0_0.distcp"), "torch cannot read"),
    "shard gone": (lambda folder: (folder / "__0_0.distcp").unlink(), "there is no shard '__0_0.distcp'"),
    "metadata cut": (lambda folder: cut(folder / ".metadata"), "it seems to be damaged"),
    "metadata empty": (lambda folder: (folder / ".metadata").write_bytes(b""), "it seems to be damaged"),
    "metadata of words": (lambda folder: (folder / ".metadata").write_bytes(pickle.dumps({"a": 1})), "damaged"),
    "a shard elsewhere": (lambda folder: point(folder, relative_path="../secret"), "there is no shard '../secret'"),
    "a shard at a device": (lambda folder: point(folder, relative_path="/dev/zero"), "there is no shard '/dev/zero'"),
    "a long shard": (lambda folder: point(folder, length=10**12), "is cut short"),
    "a large tensor": (resize, "its shards do not fill the shape (1000000, 1000000)"),
    "transformed shards": (lambda folder: point(folder, transform_descriptors=["zstd"]), "which torch alone can undo"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_ends_in_one_sentence(case, tmp_path, capsys):
    damage, words = BROKEN[case]
    (tmp_path / "secret").write_bytes(b"\0" * 10_000)
    folder = folder_of(tmp_path / "folder")
    assert len(read_checkpoint(folder).matrices) == 1
    damage(folder)
    assert words in refusal(folder, tmp_path, capsys)
