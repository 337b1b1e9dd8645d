"""Processes that die: the checkpoint before stays usable; a restarted run ends on the weights of an undisturbed one."""

import os
import subprocess
import sys

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

ARGUMENTS = ["--steps", "6", "--save-every", "2", "--eval-batches", "2", "--batch-size", "4", "--sequence-length", "32"]
ARGUMENTS += ["--vocabulary", "300", "--width", "64", "--layers", "1"]


def torchrun(program, corpus, folder, *arguments, ranks=2, restarts=0):
    """Run a program by torchrun on CPU; return what it printed."""
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    # Without it, restarted processes may read addresses of dead ones: https://github.com/pytorch/pytorch/issues/135712
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["--max-restarts", str(restarts), str(program), *ARGUMENTS, "--text", str(corpus), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout + done.stderr


def final_state(folder):
    """Return weights and optimizer state of the only checkpoint in a folder."""
    (checkpoint,) = folder.glob("step-*")
    assert checkpoint.name == "step-00000006"
    dcp_to_torch_save(checkpoint, folder / "whole.pt")
    run = torch.load(folder / "whole.pt", weights_only=True)["run"]
    states = {
        f"{name}.{key}": value for name, state in run["optimizer"]["state"].items() for key, value in state.items()
    }
    return {**run["model"], **states}


def test_a_rank_killed_in_a_save_is_restarted_from_the_checkpoint_before(root, tmp_path, corpus):
    torchrun(root / "examples" / "train_fsdp2.py", corpus, tmp_path, "--output", "whole")
    killed = root / "tests" / "distributed" / "killed_while_saving.py"
    printed = torchrun(killed, corpus, tmp_path, "--output", "broken", restarts=3)
    assert "exitcode: -9" in printed  # it really was killed
    assert "2/6" in printed  # and went on where the first checkpoint was
    assert not (tmp_path / "broken" / "unfinished").exists()
    expected, found = final_state(tmp_path / "whole"), final_state(tmp_path / "broken")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_the_example_goes_on_at_another_number_of_processes(root, tmp_path, corpus):
    program = root / "examples" / "train_fsdp2.py"
    torchrun(program, corpus, tmp_path, "--steps", "4", "--output", "run")
    printed = torchrun(program, corpus, tmp_path, "--output", "run", "--resume", ranks=3)
    assert "4/6" in printed
    final_state(tmp_path / "run")
