"""Run an unchanged training script with ``--optim normuon`` known to it.

    python -m normuon_plugins.hf_trainer train.py --optim normuon ...
    torchrun --nproc-per-node 2 -m normuon_plugins.hf_trainer train.py --optim normuon ...
    accelerate launch -m normuon_plugins.hf_trainer train.py --optim normuon ...

``-m package.module`` in place of ``train.py`` runs a module.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from normuon_plugins.hf_trainer import register_normuon

USAGE = "usage: python -m normuon_plugins.hf_trainer (SCRIPT.py | -m MODULE) [arguments of the script]"


def main(arguments: list[str]) -> None:
    """Register NorMuon and run the script as Python itself would, in this process."""
    if arguments[:1] in (["-h"], ["--help"]):
        print(USAGE)
        return
    if arguments in ([], ["-m"]):
        raise SystemExit(USAGE)
    register_normuon()
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        return
    script = Path(arguments[0])
    if not script.is_file():
        raise SystemExit(f"{USAGE}\n{script} is not a file.")
    sys.argv = arguments
    if not sys.flags.safe_path:  # under -P no folder was put before PYTHONPATH, and the script's is not either
        sys.path[0] = str(script.resolve().parent)
    runpy.run_path(str(script.absolute()), run_name="__main__")  # absolute, as Python itself sets __file__


if __name__ == "__main__":
    main(sys.argv[1:])
