"""Many runs at once, each in a process with few threads, none of them twice."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from evidence.ledger import Ledger

Result = TypeVar("Result")
# Yields runs that it needs; all of them are in the ledger when it goes on.
Task = Generator[list[Any], None, Result]


class Pool:
    """Carries out runs in worker processes and writes their results to the ledger.

    Args:
        work: Module-level function of a run and of the cache folder; returns what JSON can hold.
        ledger: Where results come from and go to; this process alone writes it.
        cache: Folder of the tokens.
        workers: Processes; one thread each on a CPU.
    """

    def __init__(self, work: Callable[[Any, Path], Any], ledger: Ledger, cache: Path, workers: int) -> None:
        self.ledger = ledger
        self._work, self._cache = work, cache
        context = multiprocessing.get_context("spawn")
        self._executor = ProcessPoolExecutor(workers, context, initializer=_begin_worker)
        self._running: dict[Future[Any], Any] = {}

    def carry_out(self, tasks: Sequence[Task[Result]], description: str, expected: int) -> list[Result]:
        """Advance all tasks side by side; return what they return.

        Args:
            tasks: Each yields lists of runs and goes on when all of them are in the ledger.
            description: Beside the progress bar.
            expected: Runs to expect, for the bar.
        """
        results: dict[int, Result] = {}
        waiting: dict[int, list[Any]] = {index: [] for index in range(len(tasks))}
        with tqdm(total=expected, desc=description, smoothing=0) as bar:
            try:
                while waiting:
                    self._advance(tasks, waiting, results, bar)
                    if self._running:
                        self._collect(bar)
            except BaseException:
                self._executor.shutdown(wait=False, cancel_futures=True)
                raise
        return [results[index] for index in range(len(tasks))]

    def close(self) -> None:
        """End the workers."""
        self._executor.shutdown()

    def _advance(
        self, tasks: Sequence[Task[Result]], waiting: dict[int, list[Any]], results: dict[int, Result], bar: tqdm
    ) -> None:
        """Let every task go on that has all it waited for, until each waits for something or has ended."""
        for index in list(waiting):
            while index in waiting and all(run in self.ledger for run in waiting[index]):
                bar.update(len(waiting[index]))
                try:
                    waiting[index] = next(tasks[index])
                except StopIteration as end:
                    results[index] = end.value
                    del waiting[index]
                    break
                for run in waiting[index]:
                    if run not in self.ledger and run not in self._running.values():
                        self._running[self._executor.submit(self._work, run, self._cache)] = run
        bar.total = max(bar.total, bar.n + sum(map(len, waiting.values())))

    def _collect(self, bar: tqdm) -> None:
        done, _ = wait(self._running, return_when=FIRST_COMPLETED)
        for future in done:
            run = self._running.pop(future)
            self.ledger.add(run, future.result())


def _begin_worker() -> None:
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
