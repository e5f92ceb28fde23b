"""Worker processes: tasks in, batches out in the same order, and an error instead of a hang when a worker dies."""

from __future__ import annotations

import logging
import multiprocessing
import signal
import threading
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from multiprocessing import resource_tracker
from types import MethodType
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils import signal_handling

from hjepa_data.errors import DataError, WorkerError, choice, refuse
from hjepa_data.processes import end_with_program
from hjepa_data.stream.batch import Batch
from hjepa_data.stream.worker import Loaded

__all__ = ["SkipCount", "StartMethod", "WorkerConfig", "load"]

_log = logging.getLogger(__name__)
_LOOK = 1.0
_MOMENT = 0.01
_END = 10.0
# They ask a program to stop; one that goes to all its processes is for the main one, which ends its workers itself.
_STOPS = {getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)}


class StartMethod(StrEnum):
    """How worker processes are started."""

    AUTO = "auto"
    FORK = "fork"
    SPAWN = "spawn"
    FORKSERVER = "forkserver"


@dataclass(kw_only=True, slots=True)
class WorkerConfig:
    """Who loads the batches.

    Attributes:
        count: worker processes; 0 loads in the process that asks. The batches do not depend on it.
        prefetch: batches that each worker prepares ahead.
        pin_memory: hand out pinned memory where there is a CUDA device.
        start_method: how workers start; ``auto`` forks on Linux, which is at once, and spawns elsewhere.
        timeout: longest wait for a batch, seconds, after which a worker is taken to hang; None waits for ever. It must
            be longer than a shard may take to be fetched.
    """

    count: int = 0
    prefetch: int = 2
    pin_memory: bool = False
    start_method: StartMethod = StartMethod.AUTO
    timeout: float | None = 1800.0

    def __post_init__(self) -> None:
        if self.count < 0:
            refuse("count", self.count, "no number of workers", "allowed: 0 (load in this process) and more")
        if self.prefetch < 1:
            refuse("prefetch", self.prefetch, "a worker prepares at least one batch", "allowed: 1 and more")
        self.start_method = choice(StartMethod, "start_method", self.start_method, "no such way")
        if self.timeout is not None and not 0 < self.timeout < float("inf"):
            refuse("timeout", self.timeout, "no batch is so fast", "allowed: more than 0, seconds, or None")


class SkipCount:
    """Images that one rank left out since its stream was built, by reason, and the limit on their share.

    Args:
        max_fraction: largest share; ten are always allowed, so that one bad image of a small set stops nobody.
        expected: images of one pass on this rank: the share is of those, or of all that were shown if they are more, so
            that a lost shard, whose images stand close together, counts alike wherever a stream begins.
    """

    _ALWAYS_ALLOWED = 10

    def __init__(self, max_fraction: float, expected: int) -> None:
        self._max_fraction = max_fraction
        self._expected = expected
        self._seen = 0
        self.reasons: Counter[str] = Counter()

    def add(self, loaded: Loaded) -> Batch:
        """Count what a worker left out; the first of each reason is logged as a warning.

        Args:
            loaded: what came back from the worker.

        Returns:
            Its batch.

        Raises:
            DataError: the worker met an error, or too many images were left out.
        """
        if loaded.batch is None:
            raise DataError(loaded.error)
        for reason, example in loaded.examples.items():
            if reason not in self.reasons:
                _log.warning("an image is left out (%s): %s; the next ones are only counted", reason, example)
        self.reasons.update({str(reason): number for reason, number in loaded.skipped.items()})
        self._seen += len(loaded.batch)
        total = self.reasons.total()
        if total > max(self._ALWAYS_ALLOWED, self._max_fraction * max(self._seen, self._expected)):
            reasons = ", ".join(f"{number} {reason}" for reason, number in self.reasons.most_common())
            last = "; ".join(loaded.examples.values())
            raise DataError(
                f"{total} images were left out beside {self._seen} that were shown ({reasons}; the last: {last}), more "
                f"than max_skipped_fraction={self._max_fraction}; mend the shards, or raise the limit"
            )
        return loaded.batch


def load(tasks: Dataset[Loaded], items: Iterable[Any], config: WorkerConfig) -> Iterator[Loaded]:
    """Do tasks in order.

    Args:
        tasks: what to do with an item.
        items: what to load, maybe without an end.
        config: who loads.

    Yields:
        What the workers give, in the order of the items.

    Raises:
        WorkerError: a worker process died, ran out of memory or gave nothing for ``timeout``.
    """
    workers = config.count > 0
    with warnings.catch_warnings():
        # More workers than cores is the user's choice, and some file systems want it.
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        loader = DataLoader(
            tasks,
            batch_size=None,
            sampler=items,  # any iterable will do
            num_workers=config.count,
            collate_fn=_share if workers else _as_it_is,
            pin_memory=config.pin_memory and torch.cuda.is_available(),
            prefetch_factor=config.prefetch if workers else None,
            multiprocessing_context=_context(config) if workers else None,
            worker_init_fn=partial(_start_worker, _context(config)) if workers else None,
            # Else the loader would draw its seed from torch's global generator.
            generator=torch.Generator(),
        )
        # Python 3.12 warns of threads in the forking process; workers only decode and need no lock that these hold.
        warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning)
        if not workers:
            return iter(loader)
        if _context(config) != "fork":
            # The other ways need this process, which does not know SIGUSR1; its start lets the signals through again.
            with _blocked_signals():
                resource_tracker.ensure_running()
        with _blocked_signals():
            batches = _started(loader)
    _end_by_kill(batches)
    return _guarded(batches, config)


@contextmanager
def _blocked_signals() -> Iterator[None]:
    """Hold back what asks to stop: a worker inherits that, and hears nothing before it has begun to ignore it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _started(loader: DataLoader[Loaded]) -> Iterator[Loaded]:
    """Start the workers, without the signal handler with which torch would raise at any line of the program."""
    # To remove the handler afterwards would be too late for a worker that dies while the others start.
    signal_handling._SIGCHLD_handler_set = True
    others = multiprocessing.active_children()
    try:
        return iter(loader)
    except BaseException:
        # They hear no SIGTERM, with which the interpreter would end them, and wait for them, when it exits.
        for worker in set(multiprocessing.active_children()) - set(others):
            worker.kill()
        raise


def _end_by_kill(batches: Any) -> None:  # noqa: ANN401 (its type is private)
    """Let the loader that is closed, and an interpreter that exits, kill workers where they would send SIGTERM."""
    for worker in batches._workers:
        process = worker._popen
        # Through a proxy: a process that refers to itself would keep its pipes until the garbage is collected.
        process.terminate = MethodType(type(process).kill, weakref.proxy(process))


def _guarded(batches: Any, config: WorkerConfig) -> Iterator[Loaded]:  # noqa: ANN401 (as above)
    """Hand out batches, and look at the workers every second while one is waited for."""
    # The loader itself looks after five seconds in which no worker gave anything, and cannot say which one it was.
    batches._get_data = partial(_await_data, batches, config.timeout)
    try:
        yield from batches
    except WorkerError:
        # The loader's own way to end workers waits for each of them.
        for worker in batches._workers:
            worker.kill()
        # One that has died as it looked at the event, as each does with each task, holds its lock for ever.
        batches._workers_done_event = threading.Event()
        raise
    except MemoryError:
        raise WorkerError(
            "a worker ran out of memory, maybe of shared memory (/dev/shm); fewer workers or a smaller batch need less"
        ) from None
    finally:
        # Else the loader would refer to itself, and end its workers only when the garbage is collected.
        del batches._get_data


def _await_data(batches: Any, timeout: float | None) -> Any:  # noqa: ANN401
    """Wait for what any worker gives next."""
    began = time.monotonic()
    while True:
        _check_workers(batches)
        try:
            arrived, data = batches._try_get_data(_LOOK)
        except Exception:
            # Maybe a worker died while it handed over a batch; its sockets end a moment before it does.
            deadline = time.monotonic() + _END
            while time.monotonic() < deadline:
                _check_workers(batches)
                time.sleep(_MOMENT)
            raise
        if arrived:
            return data
        if timeout is not None and time.monotonic() - began > timeout:
            number = batches._task_info[batches._rcvd_idx][0]
            raise WorkerError(
                f"worker {number} (process {batches._workers[number].pid}) has given nothing for {timeout:g} s; "
                "does its disk or network answer? the workers' timeout says how long to wait"
            )


def _check_workers(batches: Any) -> None:  # noqa: ANN401
    for number, worker in enumerate(batches._workers):
        if not worker.is_alive():
            raise WorkerError(_obituary(number, worker)) from None
    if batches._pin_memory and not batches._pin_memory_thread.is_alive():
        raise WorkerError("the thread that moves batches into pinned memory died; its traceback is above")


def _obituary(number: int, worker: Any) -> str:  # noqa: ANN401 (processes differ with their start method)
    code = worker.exitcode
    if code is not None and code < 0:
        end = f"was ended by signal {-code} ({signal.strsignal(-code)})"
    else:
        end = f"ended with exit code {code}"
    hint = "; out of memory? fewer workers or a smaller batch need less" if code == -signal.SIGKILL else ""
    return f"worker {number} (process {worker.pid}) {end}{hint}"


def _context(config: WorkerConfig) -> str:
    if config.start_method is not StartMethod.AUTO:
        return str(config.start_method)
    return "fork" if multiprocessing.get_start_method(allow_none=True) in {None, "fork"} and _can_fork() else "spawn"


def _can_fork() -> bool:
    import sys

    return sys.platform == "linux"


def _as_it_is(loaded: Any) -> Any:  # noqa: ANN401 (the loader's types are for lists of samples)
    return loaded


def _share(loaded: Any) -> Any:  # noqa: ANN401 (as above)
    """Move a batch into shared memory before it is handed over, where a want of it would go unheard."""
    batch = loaded.batch
    tensors = [*batch.views, *batch.numbers] if isinstance(batch, Batch) else []
    for tensor in [*tensors, *([] if loaded.encoded is None else [loaded.encoded.data])]:
        try:
            tensor.share_memory_()  # type: ignore[no-untyped-call, unused-ignore]
        except RuntimeError as error:
            raise MemoryError from error
    return loaded


def _start_worker(method: str, _: int) -> None:
    for number in _STOPS:
        signal.signal(number, signal.SIG_IGN)
    end_with_program(method)
