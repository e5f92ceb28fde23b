"""Do the same to many shards in several processes, with results in their order."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from hjepa_data.errors import DataError
from hjepa_data.processes import end_with_program

__all__ = ["map_in_order"]

T = TypeVar("T")
R = TypeVar("R")


def map_in_order(
    function: Callable[[T], R], tasks: Sequence[T], *, workers: int, started: Callable[[], None] = lambda: None
) -> Iterator[R]:
    """Call a function for each task, in several processes.

    Args:
        function: reaches each process once, when it starts; can be pickled where processes cannot be forked.
        tasks: its arguments.
        workers: processes; one works in this process.
        started: called when the processes run: threads may be started from now on.

    Yields:
        The results in the order of the tasks.

    Raises:
        DataError: a process was killed.
    """
    if workers == 1 or len(tasks) <= 1:
        started()
        yield from map(function, tasks)
        return
    # Forked at the first task, before anyone here has started a thread.
    method = "fork" if sys.platform == "linux" else "spawn"
    context = multiprocessing.get_context(method)
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(min(workers, len(tasks)), context, _start, (method, function)) as pool:
        waiting: deque[Future[R]] = deque()
        try:
            for task in tasks:
                with warnings.catch_warnings():
                    # Python 3.12 warns of threads in the forking process; these only read, encode and write.
                    warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork")
                    waiting.append(pool.submit(_call, task))
                if len(waiting) == 1:
                    started()
                # Millions of tasks are handed out as they are worked off.
                if len(waiting) >= 4 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise DataError("a worker process was killed, perhaps for want of memory; try fewer workers") from None
        except BaseException:
            processes = set(multiprocessing.active_children()) - others
            # A terminal has told them already, and a second time does nothing.
            for process in processes:
                assert process.pid is not None
                with suppress(OSError):
                    os.kill(process.pid, signal.SIGINT)
            # An interrupt while a thread is joined would have it that the thread has ended (CPython issue 90882).
            pool.shutdown(wait=False, cancel_futures=True)
            try:
                with suppress(KeyboardInterrupt):  # twice is no reason to leave parts of files; three times is
                    _join(processes)
                _join(processes)
            finally:
                for process in processes:
                    process.kill()
            raise


def _join(processes: Iterable[BaseProcess]) -> None:
    for process in processes:
        process.join()


class _Worker:
    """What a process of the pool does: a function may hold a large source, so it does not travel with each task."""

    def __init__(self) -> None:
        self.function: Callable[[Any], Any] | None = None
        self.working = self.ended = False

    def call(self, task: Any) -> Any:  # noqa: ANN401
        """Do a task, unless they were interrupted."""
        assert self.function is not None
        self.working = True
        try:
            if self.ended:
                raise KeyboardInterrupt
            return self.function(task)
        finally:
            self.working = False

    def interrupt(self, *_: object) -> None:
        """Stop the task at hand, once, so that it tidies up; between tasks the lock of a queue may be held."""
        first, self.ended = not self.ended, True
        if first and self.working:
            raise KeyboardInterrupt


_worker = _Worker()


def _start(method: str, function: Callable[[Any], Any]) -> None:
    end_with_program(method)
    _worker.function = function
    # Ignored in what a shell runs in the background.
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _worker.interrupt)


def _call(task: Any) -> Any:  # noqa: ANN401
    return _worker.call(task)
