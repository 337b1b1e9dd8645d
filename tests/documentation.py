"""The code blocks of README and docs, and what runs commands: the program that they name, in this process."""

import contextlib
import io
import os
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path
from unittest import mock

import torch
from packaging.requirements import Requirement
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import LlamaConfig, PreTrainedTokenizerFast

from normuon_plugins import NorMuon
from tests.adapters.cpu_start import forget
from tests.models import tiny_llama, token_blocks

# Sizes that let an example program end in seconds; the page says none, so that they come last.
SHORT = "--steps 2 --eval-every 2 --save-every 2 --eval-batches 1 --batch-size 2 --sequence-length 16"
SHORT += " --vocabulary 300 --width 64 --layers 1"
# The same of normuon tune.
SHORT_TUNE = "--steps 2 --budget 4 --batch-size 2 --sequence-length 16"

# What a reader has at hand where a page says train.py: a script for the Trainer that never heard of us.
TRAIN_SCRIPT = """
import json, sys, time
from transformers import GPT2Config, GPT2LMHeadModel, HfArgumentParser, Trainer, TrainingArguments
import torch
(arguments,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
torch.manual_seed(0)
model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=8))
data = [{"input_ids": block, "labels": block} for block in torch.randint(0, 32, (8, 8))]
trainer = Trainer(model=model, args=arguments, train_dataset=data)
trainer.train()
optimizer = trainer.optimizer.optimizer
if trainer.is_world_process_zero():
    layouts = sorted({group.get("layout", "-") for group in optimizer.param_groups})
    print(json.dumps([type(optimizer).__name__, layouts, arguments.world_size, __name__]))
if torch.distributed.is_initialized():  # as end_processes() of the examples does, and for its reason
    time.sleep(0.5)
    torch.distributed.destroy_process_group()
"""
TRAIN_OPTIONS = "--output_dir out --max_steps 1 --use_cpu --report_to none --save_strategy no"
TRL_OPTIONS = "--max_steps 1 --use_cpu --report_to none"


def blocks(page):
    """Return ``(language, code)`` of every fenced block of a page, in order."""
    fences = page.read_text().split("\n```")[1:]  # what stands inside a fence, then what follows it, ...
    return [(block.partition("\n")[0].strip(), block.partition("\n")[2] + "\n") for block in fences[::2]]


def commands(page):
    """Return every command of a page's ``bash`` blocks as a list of words."""
    lines = "".join(code for language, code in blocks(page) if language == "bash").replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def names():
    """Return what a page may take for granted, the same for all pages."""
    dataset = token_blocks(8)
    return {"model": tiny_llama(), "dataset": dataset, "loader": DataLoader(dataset, 4)}


def make_sandbox(folder, root, corpus):
    """Fill the folder in which commands run: the examples, a user's script, and models where a page names the hub."""
    shutil.copytree(root / "examples", folder / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(corpus, folder / "text")
    (folder / "train.py").write_text(TRAIN_SCRIPT)
    for name in ("meta-llama/Llama-3.1-8B", "checkpoint"):
        LlamaConfig(architectures=["LlamaForCausalLM"], num_hidden_layers=2).save_pretrained(folder / name)
    page = root / "docs" / "tuning.md"
    _make_tuned(folder, next(code for _, code in blocks(page) if code.startswith("# my_task.py")))
    weight = torch.nn.Parameter(torch.zeros(4, 6))
    optimizer = NorMuon([("layers.0.weight", weight)])
    weight.grad = torch.ones(4, 6) + torch.eye(4, 6)
    optimizer.step()
    (folder / "out" / "checkpoint-1000").mkdir(parents=True)
    torch.save(optimizer.state_dict(), folder / "out" / "checkpoint-1000" / "optimizer.pt")


def _make_tuned(folder, task):
    """Write what docs/tuning.md takes for granted: a language model with a tokenizer, a text, and its my_task.py."""
    (folder / "my_task.py").write_text(task)
    text = " ".join(f"word{number % 7}" for number in range(400))
    (folder / "book.txt").write_text(text)
    words = {word: index for index, word in enumerate(["<unk>", "<eos>", *sorted(set(text.split()))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder / "my-model")
    tiny_llama().save_pretrained(folder / "my-model")


class Runner:
    """Runs a command in this process, one process where a launcher would start several.

    Launchers are asked whether they know their own options; that they work is shown by test_launcher.py,
    test_examples.py and the tests of the adapters, which start them.

    Args:
        root: The checkout.
    """

    def __init__(self, root):
        self.root = root

    def __call__(self, words):
        while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words = words[1:]
        getattr(self, f"_{words[0]}")(words[1:])

    def _pip(self, words):
        assert words[0] == "install"
        extras = re.findall(r"^(\w+) = \[", (self.root / "pyproject.toml").read_text(), re.MULTILINE)
        for word in words[1:]:
            if not word.startswith("-"):
                requirement = Requirement(f"normuon-plugins{word[1:]}" if word.startswith(".") else word)
                assert requirement.name != "normuon-plugins" or requirement.extras <= {*extras}

    def _make(self, words):
        assert set(words) <= set(re.findall(r"^([a-z]+):", (self.root / "Makefile").read_text(), re.MULTILINE))

    def _normuon(self, words):
        from normuon_plugins.cli import main

        more = shlex.split(SHORT_TUNE) if words[0] == "tune" else []
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            assert main([*words, *more]) == 0
        assert printed.getvalue()

    def _torchrun(self, words):
        from torch.distributed.run import parse_args

        parsed = parse_args(words)
        self._python([*(["-m"] if parsed.module else []), parsed.training_script, *parsed.training_script_args])

    def _accelerate(self, words):
        from accelerate.commands.launch import launch_command_parser

        assert words[0] == "launch"
        parsed = launch_command_parser().parse_args(words[1:])
        if parsed.config_file:
            assert Path(parsed.config_file).is_file()
        self._python([*(["-m"] if parsed.module else []), parsed.training_script, *parsed.training_script_args])

    def _python(self, words):
        if words[:2] in (["-m", "venv"], ["-m", "pytest"]):
            return  # environments of other versions: docs/compatibility.md says what they gave
        if words[:2] == ["-m", "normuon_plugins"]:
            self._normuon(words[2:])
        elif words[0] == "-m":
            assert words[1] == "normuon_plugins.hf_trainer"
            more = shlex.split(TRAIN_OPTIONS) if "train.py" in words else shlex.split(TRL_OPTIONS)
            run_in_process(["-m", *words[1:], *more])
        else:
            assert Path(words[0]).is_file()
            more = [*shlex.split(SHORT), "--text", "text"] if Path(words[0]).name.startswith("train_") else []
            run_in_process([*words, *more])


def run_in_process(words):
    """Do what ``python`` does with ``words``, and leave the process as it was."""
    module = words[0] == "-m"
    arguments = words[1:] if module else words
    path = [str(Path(arguments[0]).parent.resolve()), *sys.path]
    forget()
    sys.modules.pop(f"{arguments[0]}.__main__", None)  # another test may have imported it
    with mock.patch.object(sys, "argv", arguments), mock.patch.object(sys, "path", path), mock.patch.dict(os.environ):
        (runpy.run_module if module else runpy.run_path)(arguments[0], run_name="__main__")
