"""The example programs as a user runs them, shortened, and the demo's own arithmetic."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.adapters.cpu_start import forget

SHORT = ["--steps", "6", "--eval-every", "3", "--save-every", "3", "--eval-batches", "2", "--batch-size", "4"]
SHORT += ["--sequence-length", "32", "--vocabulary", "300", "--width", "64", "--layers", "1"]


PROGRAMS = ["train_accelerate.py", "train_hf_trainer.py", "train_lightning.py"]
TORCHRUN = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node", "2"]


def execute(command, folder):
    """Run a command in ``folder`` and return what it printed."""
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def run(root, folder, program, *arguments, launcher=(sys.executable,)):
    return execute([*launcher, str(root / "examples" / program), *SHORT, "--lr", "0.02", *arguments], folder)


def final_loss(printed):
    (found,) = re.findall(r"validation loss ([\d.]+) after 6 steps", printed)  # from one process, whatever their number
    return float(found)


@pytest.fixture(scope="module", params=PROGRAMS)
def trained(request, root, corpus, tmp_path_factory):
    """A program, the folder of its first run, and the loss that run ended with."""
    folder = tmp_path_factory.mktemp(Path(request.param).stem)
    return request.param, folder, final_loss(run(root, folder, request.param, "--text", str(corpus)))


def test_program_trains_saves_and_resumes(root, corpus, trained):
    program, folder, loss = trained
    assert 0 < loss < 5.5  # ln(300) = 5.704 before training
    if program == "train_hf_trainer.py":  # resuming a finished run, the Trainer takes one step more
        shutil.rmtree(folder / "runs" / "train_hf_trainer" / "checkpoint-6")
    assert final_loss(run(root, folder, program, "--text", str(corpus), "--resume")) == pytest.approx(loss, abs=1e-3)


def test_program_runs_the_other_optimizers(root, tmp_path, corpus, trained):
    """The three losses after the same steps from the same weights differ, so each option took effect."""
    program, _, loss = trained
    losses = [
        final_loss(run(root, tmp_path, program, "--text", str(corpus), "--optim", name)) for name in ("adamw", "muon")
    ]
    assert len({loss, *losses}) == 3


def test_program_runs_in_two_processes(root, tmp_path, corpus, trained):
    """Half the batch in each of two processes: another order of the data, but for the noise of it the same loss."""
    program, _, loss = trained
    arguments = ["--text", str(corpus), "--batch-size", "2"]
    assert final_loss(run(root, tmp_path, program, *arguments, launcher=TORCHRUN)) == pytest.approx(loss, abs=0.2)


def test_processes_end_without_an_abort_right_after_a_collective(root, tmp_path):
    """Without the pause of ``end_processes``, one start of this program in five failed."""
    program = tmp_path / "program.py"
    program.write_text(f"""
import sys
sys.path.insert(0, {str(root / "examples")!r})
import torch
import torch.distributed as dist
from settings import end_processes
dist.init_process_group("gloo")
group = dist.group.WORLD  # as a DDP model refers to it
gathered = [torch.empty(200_000) for _ in range(2)]
dist.all_gather(gathered, torch.ones(200_000))
del gathered
end_processes()
""")
    execute([*TORCHRUN, str(program)], tmp_path)


def test_lightning_cli_runs_in_two_processes(root, tmp_path):
    command = [*TORCHRUN, str(root / "examples" / "lightning_cli.py"), "fit", "--trainer.devices", "2"]
    command += ["--config", str(root / "examples" / "lightning_cli.yaml"), "--trainer.max_steps", "6"]
    execute(command, tmp_path)
    (table,) = (tmp_path / "runs" / "lightning_cli").glob("*/metrics.csv")
    assert "normuon/update_rms" in table.read_text().partition("\n")[0]


def test_comparison_prints_a_table_and_draws_the_curves(root, tmp_path, corpus):
    printed = run(root, tmp_path, "compare_optimizers.py", "--text", str(corpus))
    for label in ("AdamW", "Muon", "NorMuon", "seconds", "MiB"):
        assert label in printed
    assert (tmp_path / "demo" / "loss.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert len(results["normuon"]["step_seconds"]) == 6
    assert results["normuon"]["state_bytes"] < results["adamw"]["state_bytes"]


def test_interrupted_run_resumes_as_if_nothing_had_happened(tmp_path, corpus, monkeypatch):
    import train_accelerate
    from settings import parse_arguments

    # A test before this one may have left an Accelerator of another precision than the example takes on this machine.
    forget()

    def arguments(output, *more):
        paths = ["--text", str(corpus), "--output", str(tmp_path / output), "--cache", str(tmp_path / "cache")]
        return parse_arguments("test", [*SHORT, *paths, *more])

    whole = train_accelerate.train(arguments("whole"))

    class Interrupted(train_accelerate.tqdm):
        def update(self, n=1):
            super().update(n)
            if self.n == 5:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train_accelerate, "tqdm", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_accelerate.train(arguments("broken"))
    resumed = train_accelerate.train(arguments("broken", "--resume"))
    assert len(resumed.step_seconds) == 3
    assert resumed.losses == pytest.approx(whole.losses, abs=1e-6)


def test_steps_to_reach_lie_between_evaluations():
    from compare_optimizers import steps_to_reach

    losses = {10: 5.0, 20: 4.0, 30: 3.5}
    assert steps_to_reach(losses, 4.5) == 15
    assert steps_to_reach(losses, 3.5) == 30
    assert steps_to_reach(losses, 6.0) == 10
    assert steps_to_reach(losses, 3.0) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--width", "100"], "100 is not a multiple of 64"),
        (["--resume", "--output", "nowhere"], "there is no checkpoint of this program in nowhere"),
        (["--resume", "--output", "other", "--optim", "adamw"], "the run in other trains with --optim muon"),
    ],
)
def test_impossible_arguments_end_with_a_message(arguments, message, tmp_path, monkeypatch, capsys):
    from settings import parse_arguments

    monkeypatch.chdir(tmp_path)
    parse_arguments("test", ["--output", "other", "--optim", "muon"])
    (tmp_path / "other" / "last.ckpt").touch()
    with pytest.raises(SystemExit):
        parse_arguments("test", arguments, checkpoint="last.ckpt")
    assert message in capsys.readouterr().err


def test_corpus_is_cached_by_content(tmp_path, corpus):
    from corpus import load_corpus

    options = {"dataset": None, "model": None, "vocabulary": 300, "sequence_length": 16, "cache": tmp_path}
    first = load_corpus(text=[corpus], **options)
    (file,) = tmp_path.glob("tokens-*.pt")
    written = file.stat().st_mtime_ns
    second = load_corpus(text=[corpus], **options)
    assert file.stat().st_mtime_ns == written
    assert torch.equal(first[0].blocks, second[0].blocks)
    (tmp_path / "other.txt").write_text("\n\n".join("another text " * 20 for _ in range(30)))
    load_corpus(text=[tmp_path / "other.txt"], **options)
    assert len(list(tmp_path.glob("tokens-*.pt"))) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "0 documents cannot be divided"), ("\n\n".join(["ab"] * 25), "less than one block of 100000")],
)
def test_too_little_text_is_refused(tmp_path, text, message):
    from corpus import load_corpus

    (tmp_path / "text.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_corpus(
            text=[tmp_path / "text.txt"],
            dataset=None,
            model=None,
            vocabulary=300,
            sequence_length=100_000,
            cache=tmp_path,
        )
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_corpus(
            text=[tmp_path / "missing"], dataset=None, model=None, vocabulary=300, sequence_length=8, cache=tmp_path
        )


def test_local_model_and_its_tokenizer_take_the_place_of_the_small_llama(root, tmp_path, corpus):
    from corpus import END_OF_TEXT, load_documents, train_tokenizer
    from transformers import PreTrainedTokenizerFast

    from tests.models import tiny_llama

    tokenizer = train_tokenizer(load_documents([corpus], None), 300)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT).save_pretrained(tmp_path / "model")
    tiny_llama(vocab_size=300).save_pretrained(tmp_path / "model")
    final_loss(run(root, tmp_path, "train_accelerate.py", "--text", str(corpus), "--model", str(tmp_path / "model")))
