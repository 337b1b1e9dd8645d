"""examples/accelerate_fsdp2.yaml, read by Accelerate's own launcher, and a program launched with it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate import FullyShardedDataParallelPlugin, ParallelismConfig
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.distributed.fsdp import CPUOffloadPolicy, StateDictType

from tests.adapters import cpu_start
from tests.models import tiny_llama
from tests.test_examples import SHORT

CONFIG = Path(__file__).parents[2] / "examples" / "accelerate_fsdp2.yaml"
TWO_MACHINES = "--num_machines 2 --num_processes 16 --machine_rank 1 --main_process_ip 10.0.0.1 --rdzv_backend c10d"


@pytest.fixture(autouse=True)
def _first_accelerator():
    cpu_start.forget()
    yield
    cpu_start.forget()


@pytest.fixture
def launched(monkeypatch):
    """Merge a file and a command line as the launcher does, set what its processes find; return its arguments."""

    def launch(config, line="--main_process_port 0"):  # a free port
        parsed = launch_command_parser().parse_args(["--config_file", str(config), *line.split(), "train.py"])
        merged, _, _ = _validate_launch_command(parsed)
        for name, value in prepare_multi_gpu_env(merged).items():
            monkeypatch.setenv(name, value)
        return merged

    return launch


def with_lines(path, first):
    """Return a copy of the file in which the commented lines from the one that begins with ``first`` are in force."""
    before, found, after = CONFIG.read_text().partition(f"# {first}")
    assert found
    path.write_text(before + f"{first}{after}".replace("\n# ", "\n"))
    return path


def test_the_launcher_knows_every_key():
    config = yaml.safe_load(CONFIG.read_text())
    options = vars(launch_command_parser().parse_args(["train.py"]))
    known = {*options, "compute_environment", "distributed_type", "fsdp_config"}
    assert config.keys() | config["fsdp_config"].keys() <= known


def test_processes_shard_with_fsdp2_as_the_file_says(launched):
    arguments = launched(CONFIG)
    plugin = FullyShardedDataParallelPlugin()
    assert arguments.use_fsdp
    assert (arguments.num_processes, arguments.mixed_precision) == (8, "bf16")
    assert (plugin.fsdp_version, plugin.reshard_after_forward) == (2, True)
    assert plugin.state_dict_type == StateDictType.SHARDED_STATE_DICT
    assert (plugin.cpu_ram_efficient_loading, plugin.activation_checkpointing) == (False, False)
    assert not isinstance(plugin.cpu_offload, CPUOffloadPolicy)


def test_layers_of_hugging_face_models_are_wrapped_without_naming_them(launched):
    launched(CONFIG)
    plugin = FullyShardedDataParallelPlugin()
    plugin.set_auto_wrap_policy(tiny_llama())
    (layer,) = plugin.auto_wrap_policy.keywords["transformer_layer_cls"]
    assert layer.__name__ == "LlamaDecoderLayer"


def test_the_commented_lines_give_hsdp(launched, tmp_path):
    assert launched(with_lines(tmp_path / "hsdp.yaml", "parallelism_config:")).use_parallelism_config
    mesh = ParallelismConfig()
    assert (mesh.dp_replicate_size, mesh.dp_shard_size) == (2, 4)


def test_the_command_line_spreads_it_over_two_machines(launched):
    arguments = launched(CONFIG, TWO_MACHINES)
    assert (arguments.nnodes, arguments.nproc_per_node, arguments.node_rank) == ("2", "8", 1)
    assert (arguments.rdzv_backend, arguments.rdzv_endpoint) == ("c10d", "10.0.0.1:29500")


def test_the_example_shards_when_it_is_launched_with_the_file(root, tmp_path, corpus):
    """Two processes of `accelerate launch`, told that they have GPUs; each writes its part of the checkpoint."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIG)]
    launcher += ["--num_processes", "2", "--main_process_port", "0", "-m", "tests.adapters.accelerate_runs"]
    program = [str(root / "examples" / "train_accelerate.py"), *SHORT, "--text", str(corpus)]
    environment = {**os.environ, "PYTHONPATH": str(root), "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [*launcher, *program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert 0 < float(re.search(r"validation loss ([\d.]+) after 6 steps", done.stdout)[1]) < 5.5  # ln(300) = 5.704
    for part in ("pytorch_model_fsdp_0", "optimizer_0"):
        parts = (tmp_path / "runs" / "train_accelerate" / part).glob("*.distcp")
        assert {file.name.split("_")[2] for file in parts} == {"0", "1"}
