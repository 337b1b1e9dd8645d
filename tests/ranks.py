"""Run a function in several processes that form a gloo group, and bring back what they return or raise."""

import faulthandler
import os
import signal
import sys
import tempfile
import traceback
from datetime import timedelta
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# What every process would import; what is not installed is passed over.
PRELOADED = [
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "normuon_plugins",
    "transformers.trainer",
    "accelerate",
    "lightning.pytorch",
]
# Longer than any collective of the tests takes, and shorter than the limit below: a hang ends with the name of the
# collective that hangs, in the process where it hangs.
COLLECTIVE_TIMEOUT = timedelta(seconds=60)


def run_ranks(function, world_size, *arguments, timeout=180):
    """Call ``function(*arguments)`` in ``world_size`` processes of their own and return their results, by rank.

    Args:
        function: A module-level function; the default process group exists when it is called, and the environment looks
            as torchrun leaves it.
        world_size: Number of processes.
        *arguments: Picklable.
        timeout: Seconds until the processes are killed and ``TimeoutError`` names those that had not returned.

    Raises:
        AssertionError: With the traceback of the first process that failed, and the signal that ended one without a
            result, with its traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = _context()
        processes = [
            context.Process(target=_main, args=(function, rank, world_size, folder, arguments), daemon=True)
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        waiting = set(range(world_size))
        remaining = float(timeout)
        while waiting and remaining > 0 and not list(Path(folder).glob("error-*")):
            processes[min(waiting)].join(0.2)
            remaining -= 0.2
            waiting = {rank for rank in waiting if processes[rank].is_alive()}
        crashed = "".join(
            f"rank {rank} of {world_size} ended with {signal.Signals(-process.exitcode).name}\n"
            f"{(Path(folder) / f'crash-{rank}').read_text()}\n"
            for rank, process in enumerate(processes)
            if (process.exitcode or 0) < 0 and not (Path(folder) / f"result-{rank}").exists()
        )
        for process in processes:
            process.kill() if process.is_alive() else None
            process.join()
        # The first to fail: the others lose their connection to it.
        for error in sorted(Path(folder).glob("error-*"), key=lambda file: file.stat().st_mtime_ns):
            name = error.name.replace("error-", "rank ")
            raise AssertionError(f"{crashed}{name} of {world_size}:\n{error.read_text()}")
        if crashed:
            raise AssertionError(crashed)
        if waiting:
            raise TimeoutError(f"ranks {sorted(waiting)} of {world_size} had not returned after {timeout} s")
        return [torch.load(Path(folder) / f"result-{rank}", weights_only=False) for rank in range(world_size)]


@cache
def _context():
    """Return how processes are started: by fork, of a clean process in which nothing has happened but these imports.

    Importing torch anew takes a process longer than many a test: three of them 4 s on two cores, in place of 0.1.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _main(function, rank, world_size, folder, arguments):
    crash = (Path(folder) / f"crash-{rank}").open("w")  # faulthandler writes to it until the process has ended
    faulthandler.enable(crash)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        TORCHELASTIC_RUN_ID="tests",
        GLOO_SOCKET_IFNAME="lo",
        OMP_NUM_THREADS="1",
        CUDA_VISIBLE_DEVICES="",
    )
    torch.set_num_threads(1)
    folder = Path(folder)
    try:
        store = dist.FileStore(str(folder / "store"), world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=COLLECTIVE_TIMEOUT)
        result = function(*arguments)
        torch.save(result, folder / f"result-{rank}")
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        partial = folder / f"partial-{rank}"
        partial.write_text(traceback.format_exc())
        partial.rename(folder / f"error-{rank}")
        sys.exit(1)
