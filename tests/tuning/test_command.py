"""``normuon tune``: a language model and text files, or a function; what it prints, and one sentence for a mistake."""

import json

import pytest
import torch
from corpus import END_OF_TEXT, train_tokenizer
from transformers import PreTrainedTokenizerFast

from normuon_plugins.cli import main
from normuon_plugins.tuning.language_model import load_language_model, token_batches
from tests.models import tiny_llama

VOCABULARY = 300
SHORT = ["--steps", "4", "--budget", "4", "--batch-size", "2", "--sequence-length", "16"]

MODULE = """
import torch

def make():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 1))
    batches = [torch.randn(8, 4) for _ in range(10)]
    return model, batches, {"loss": lambda model, x: (model(x).squeeze(1) - x.sum(1)).square().mean(), "steps": 4}

def nothing():
    return None

def fails():
    return 1 / 0
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a tiny language model, its tokenizer and a text."""
    folder = tmp_path_factory.mktemp("model")
    text = " ".join(f"word{number % 23} comes before word{(number + 1) % 23}." for number in range(400))
    tokenizer = train_tokenizer([text], VOCABULARY)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT).save_pretrained(folder)
    tiny_llama(seed=5, vocab_size=tokenizer.get_vocab_size()).save_pretrained(folder)
    (folder / "text.txt").write_text(text)
    return folder


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_task.py").write_text(MODULE)
    return tmp_path


def printed(capsys, *words):
    assert main(["tune", *map(str, words)]) == 0
    return capsys.readouterr()


def test_a_language_model_and_a_text_are_enough(saved, work, capsys):
    weights = (saved / "model.safetensors").read_bytes()
    output = printed(capsys, saved, "--text", saved / "text.txt", "--lr", "1e-3", "--out", "new/rates.png", *SHORT)
    assert "build_normuon(model, lr=" in output.out
    assert "TrainingArguments(..., optim=" in output.out
    assert output.out.endswith("wrote new/rates.png\n")
    assert "At most 4 runs of 4 steps" in output.err
    assert (work / "new" / "rates.png").stat().st_size > 5000
    assert (saved / "model.safetensors").read_bytes() == weights


def test_json_has_the_trials_and_nothing_else_is_printed(saved, work, capsys):
    options = ["--option", "beta2=0.9", "--option", "weight_decay=0", "--adamw-lr", "2e-3"]
    read = json.loads(printed(capsys, saved, "--text", saved / "text.txt", "--json", *options, *SHORT).out)
    assert read["options"] == {"beta2": 0.9, "weight_decay": 0}
    assert read["start"] == {"lr": 1e-3, "adamw_lr": 2e-3}
    assert sum(trial["steps"] for trial in read["trials"]) <= 16


def test_fresh_weights_are_those_of_no_training(saved, work, capsys):
    read = json.loads(printed(capsys, saved, "--text", saved / "text.txt", "--json", "--fresh", *SHORT).out)
    model, tokenizer = load_language_model(str(saved), fresh=True)
    assert read["untrained_loss"] == pytest.approx(torch.log(torch.tensor(len(tokenizer))).item(), abs=0.2)
    assert not model.lm_head.weight.equal(load_language_model(str(saved))[0].lm_head.weight)


def test_batches_are_the_text_cut_into_blocks_and_shuffled(saved):
    _, tokenizer = load_language_model(str(saved))
    sizes = {"batch_size": 2, "sequence_length": 16}
    batches = token_batches([saved / "text.txt"] * 2, tokenizer, **sizes, count=5)
    assert [batch["input_ids"].shape for batch in batches] == [(2, 16)] * 5
    text = tokenizer((saved / "text.txt").read_text())["input_ids"]
    stream = ",".join(map(str, [*text, tokenizer.eos_token_id] * 2))
    for row in batches[0]["input_ids"].tolist():
        assert ",".join(map(str, row)) in stream
    again = token_batches([saved / "text.txt"] * 2, tokenizer, **sizes, count=5)
    assert all(one["labels"].equal(other["input_ids"]) for one, other in zip(batches, again, strict=True))


def test_any_other_model_comes_from_a_function(work, capsys):
    read = json.loads(printed(capsys, "own_task:make", "--budget", "5", "--json").out)
    assert read["steps"] == 4
    assert read["loss"] < read["untrained_loss"]


def test_the_command_line_comes_before_what_the_function_says(work, capsys):
    assert json.loads(printed(capsys, "own_task:make", "--steps", "6", "--budget", "4", "--json").out)["steps"] == 6


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["own_task:make", "--budget", "2"], "budget=2 must be at least 4 runs."),
        (["own_task:make", "--out", "rates.txt"], "rates.txt: no picture has such a name"),
        (["own_task:make", "--option", "beta2"], "--option 'beta2' is not KEY=VALUE, such as weight_decay=0.05"),
        (["own_task:make", "--option", "betta2=0.9"], "unknown options ['betta2']"),
        (["own_task:gone"], "own_task:gone names no function: module 'own_task' has no attribute 'gone'"),
        (["no_task:make"], "no_task:make names no function: No module named 'no_task'"),
        (["own_task:nothing"], "own_task:nothing must return (model, batches) or (model, batches, options)."),
        (["./gone"], "--text FILE is missing: what should the model train on?"),
        (["./gone", "--text", "own_task.py"], "gone"),
    ],
)
def test_a_mistake_is_one_sentence_and_exits_with_1(work, capsys, words, sentence):
    assert main(["tune", *words]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("normuon tune: error: ")
    assert sentence in output.err


def test_too_little_text_says_how_much_there_is(saved, work, capsys):
    (work / "short.txt").write_text("word1 comes before word2.")
    assert main(["tune", str(saved), "--text", "short.txt"]) == 1
    assert "tokens, fewer than two batches of 8 x 256; give more text" in capsys.readouterr().err


def test_a_mistake_inside_the_function_is_shown_whole(work):
    with pytest.raises(RuntimeError, match=r"own_task:fails\(\) raised ZeroDivisionError") as error:
        main(["tune", "own_task:fails"])
    assert isinstance(error.value.__cause__, ZeroDivisionError)


def test_ctrl_c_ends_without_a_traceback(work, capsys, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("normuon_plugins.tuning.command.find_learning_rates", stop)
    assert main(["tune", "own_task:make"]) == 1
    assert capsys.readouterr().err == "normuon tune: error: interrupted\n"


def test_missing_transformers_is_a_command_to_run(work, monkeypatch, capsys):
    monkeypatch.setattr("normuon_plugins.extras.find_spec", lambda package: None)
    assert main(["tune", "model", "--text", "own_task.py"]) == 1
    assert 'transformers is not installed; run: pip install "normuon-plugins[hf]"' in capsys.readouterr().err
