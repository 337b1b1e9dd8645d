"""python -m normuon_plugins.hf_trainer, torchrun -m and accelerate launch -m on a script that never heard of us."""

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

import normuon_plugins
from normuon_plugins.hf_trainer import unregister_normuon
from normuon_plugins.hf_trainer.__main__ import main
from tests.documentation import TRAIN_SCRIPT

ARGUMENTS = ["--output_dir", "out", "--optim", "normuon", "--max_steps", "2", "--use_cpu", "--report_to", "none"]
ARGUMENTS += ["--save_strategy", "no", "--disable_tqdm", "true", "--per_device_train_batch_size", "2"]
ARGUMENTS += ["--learning_rate", "1e-3"]
BIN = Path(sys.executable).parent


def launch(command, folder, **variables):
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1", **variables}
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
    (tmp_path / "train.py").write_text(TRAIN_SCRIPT)
    printed = launch([*prefix, "normuon_plugins.hf_trainer", "train.py", *ARGUMENTS], tmp_path)
    assert printed == ["NorMuon", ["-", "i o", "i o=16+16+16"], world_size, "__main__"]


def test_module_instead_of_a_script(tmp_path):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "train.py").write_text(TRAIN_SCRIPT)
    command = [sys.executable, "-m", "normuon_plugins.hf_trainer", "-m", "package.train", *ARGUMENTS]
    assert launch(command, tmp_path) == ["NorMuon", ["-", "i o", "i o=16+16+16"], 1, "__main__"]


@pytest.mark.parametrize("safe", ["", "1"])
def test_the_script_is_found_and_finds_what_it_does_under_python_itself(tmp_path, safe):
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "from_pythonpath.py").touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "show.py").write_text("import from_pythonpath, json, sys; print(json.dumps(sys.path))")
    inherited = os.environ.get("PYTHONPATH", str(Path(normuon_plugins.__file__).parents[1]))
    environment = {"PYTHONSAFEPATH": safe, "PYTHONPATH": f"{tmp_path / 'library'}{os.pathsep}{inherited}"}
    script = "run/show.py"
    alone = launch([sys.executable, script], tmp_path, **environment)
    assert launch([sys.executable, "-m", "normuon_plugins.hf_trainer", script], tmp_path, **environment) == alone
    assert (str(tmp_path / "run") in alone) == (not safe)


@pytest.mark.parametrize("arguments", [[], ["-m"], ["no_such_script.py"]])
def test_wrong_call_ends_with_the_usage(arguments):
    with pytest.raises(SystemExit, match=r"usage: python -m normuon_plugins\.hf_trainer"):
        main(arguments)


def test_help_prints_the_usage(capsys):
    main(["--help"])
    assert "usage: python -m normuon_plugins.hf_trainer" in capsys.readouterr().out


@pytest.fixture
def run_script(tmp_path, monkeypatch):
    """Run a script through the launcher in this process, which is left as it was."""

    def run(text, *arguments):
        script = tmp_path / "train.py"
        script.write_text(text)
        main([str(script), *arguments])

    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield run
    unregister_normuon()


def test_a_typo_in_the_name_of_the_optimizer_lists_ours_among_the_known(run_script, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_script(TRAIN_SCRIPT, "--output_dir", str(tmp_path), "--optim", "normoun")
    said = capsys.readouterr().err
    assert "argument --optim: invalid choice: 'normoun'" in said
    assert "'normuon'" in said


def test_a_typo_in_optim_args_is_told_by_the_script(run_script, tmp_path):
    arguments = [argument if argument != "out" else str(tmp_path) for argument in ARGUMENTS]
    with pytest.raises(ValueError, match=r"optim_args has unknown keys \['momentun'\]"):
        run_script(TRAIN_SCRIPT, *arguments, "--optim_args", "momentun=0.9")


def test_an_exception_of_the_script_ends_in_its_own_line(run_script, tmp_path):
    with pytest.raises(ZeroDivisionError) as error:
        run_script("import sys\n\nsteps = 1 / 0  # the mistake\n")
    last = traceback.extract_tb(error.tb)[-1]
    assert (last.filename, last.lineno) == (str(tmp_path / "train.py"), 3)


def test_the_exit_status_of_the_script_is_passed_on(run_script):
    with pytest.raises(SystemExit) as error:
        run_script("raise SystemExit(3)\n")
    assert error.value.code == 3


def test_the_script_sees_its_own_arguments_and_folder(run_script, tmp_path, capsys):
    (tmp_path / "beside.py").write_text("NAME = 'beside'\n")
    run_script("import sys, beside\nprint(sys.argv[1:], beside.NAME, __file__)\n", "--flag", "1")
    assert capsys.readouterr().out.split("\n")[0] == f"['--flag', '1'] beside {tmp_path / 'train.py'}"
