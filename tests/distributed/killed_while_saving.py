"""Run the FSDP2 example so that rank 1 is killed in the middle of its second checkpoint, once. Started by torchrun."""

import os
import runpy
import signal
import sys
from pathlib import Path

from torch.distributed.checkpoint import FileSystemWriter

EXAMPLES = Path(__file__).parents[2] / "examples"


def kill_in_the_second_save():
    write_data = FileSystemWriter.write_data
    saves = []

    def write_and_die(self, plan, planner):
        saves.append(plan)
        future = write_data(self, plan, planner)
        if len(saves) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return future

    FileSystemWriter.write_data = write_and_die


if __name__ == "__main__":
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        kill_in_the_second_save()
    sys.path.insert(0, str(EXAMPLES))
    runpy.run_path(str(EXAMPLES / "train_fsdp2.py"), run_name="__main__")
