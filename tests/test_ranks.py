"""What is said of processes that end without a result."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_ranks


def crash(waits):
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    if waits:
        dist.all_reduce(torch.ones(1))


def fail():
    if dist.get_rank() == 1:
        raise KeyError("the reason")
    dist.barrier()


def hang():
    if dist.get_rank() == 1:
        time.sleep(60)


@pytest.mark.parametrize("waits", [True, False], ids=["another waits for it", "nobody waits"])
def test_a_crash_is_told_with_its_signal_and_the_place(waits):
    with pytest.raises(AssertionError, match=r"(?s)rank 1 of 2 ended with SIGSEGV.*in crash"):
        run_ranks(crash, 2, waits)


def test_an_exception_is_told_with_its_traceback():
    with pytest.raises(AssertionError, match=r"(?s)rank 1 of 2:\n.*KeyError: 'the reason'") as error:
        run_ranks(fail, 2)
    assert "in fail" in str(error.value)


def test_a_hang_ends_with_the_rank_that_hangs():
    with pytest.raises(TimeoutError, match=r"ranks \[0, 1\] of 2 had not returned after 4 s"):
        run_ranks(hang, 2, timeout=4)
