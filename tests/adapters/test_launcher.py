"""python -m normuon_plugins.hf_trainer, torchrun -m and accelerate launch -m on a script that never heard of us."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from normuon_plugins.hf_trainer.__main__ import main

SCRIPT = """
import json, sys
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
if torch.distributed.is_initialized():  # left open, gloo's threads may abort the process at its end
    torch.distributed.destroy_process_group()
"""
ARGUMENTS = ["--output_dir", "out", "--optim", "normuon", "--max_steps", "2", "--use_cpu", "--report_to", "none"]
ARGUMENTS += ["--save_strategy", "no", "--disable_tqdm", "true", "--per_device_train_batch_size", "2"]
BIN = Path(sys.executable).parent


def launch(command, folder):
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[")))


@pytest.mark.parametrize(
    ("prefix", "world_size"),
    [
        ([sys.executable, "-m"], 1),
        ([str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2", "-m"], 2),
        ([str(BIN / "accelerate"), "launch", "--cpu", "--num_processes", "1", "-m"], 1),
    ],
    ids=["python", "torchrun", "accelerate"],
)
def test_unchanged_script_trains_with_normuon(tmp_path, prefix, world_size):
    (tmp_path / "train.py").write_text(SCRIPT)
    printed = launch([*prefix, "normuon_plugins.hf_trainer", "train.py", *ARGUMENTS], tmp_path)
    assert printed == ["NorMuon", ["-", "i o", "i o=16+16+16"], world_size, "__main__"]


def test_module_instead_of_a_script(tmp_path):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "train.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "normuon_plugins.hf_trainer", "-m", "package.train", *ARGUMENTS]
    assert launch(command, tmp_path) == ["NorMuon", ["-", "i o", "i o=16+16+16"], 1, "__main__"]


@pytest.mark.parametrize("arguments", [[], ["-m"], ["no_such_script.py"]])
def test_wrong_call_ends_with_the_usage(arguments):
    with pytest.raises(SystemExit, match=r"usage: python -m normuon_plugins\.hf_trainer"):
        main(arguments)


def test_help_prints_the_usage(capsys):
    main(["--help"])
    assert "usage: python -m normuon_plugins.hf_trainer" in capsys.readouterr().out
