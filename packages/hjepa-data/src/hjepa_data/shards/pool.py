"""Do the same to many shards in several processes, with results in their order."""

from __future__ import annotations

import multiprocessing
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
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
            pool.shutdown(wait=False, cancel_futures=True)
            raise


# What a process of the pool calls: a function may hold a large source, so it does not travel with each task.
_held: list[Callable[[Any], Any]] = []


def _start(method: str, function: Callable[[Any], Any]) -> None:
    end_with_program(method)
    _held[:] = [function]


def _call(task: Any) -> Any:  # noqa: ANN401
    return _held[0](task)
