"""Signals ask a run to finish its step and save; a second Ctrl-C, or the end of a grace period, ends it at once."""

from __future__ import annotations

import logging
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Self

from hjepa_train.outcome import EXIT_PREEMPTED

logger = logging.getLogger(__name__)

_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_PATIENCE = 1.0
"""Seconds in which a repeated SIGINT is the same one: torchrun forwards what the terminal has already sent."""


class StopSignals:
    """A context in which SIGINT, SIGTERM and SIGUSR1 call `on_stop(name)`.

    Outside the main thread it does nothing, because Python handles signals there only.

    Args:
        on_stop: Called between two steps of the interpreter.
        grace_seconds: How long after a signal the context may last; then the process ends at once with exit code 75,
            even where it hangs in a call that never comes back to the interpreter. None means as long as it takes.
    """

    def __init__(self, on_stop: Callable[[str], None], grace_seconds: float | None = None) -> None:
        self._on_stop = on_stop
        self._owner = os.getpid()
        self._interrupted: float | None = None
        self._previous: dict[signal.Signals, signal._HANDLER] = {}
        self._grace = None if grace_seconds is None else _Grace(grace_seconds)

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in _STOPS:
                self._previous[number] = signal.signal(number, self._handle)
            if self._grace is not None:
                self._grace.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._grace is not None and self._previous:
            self._grace.stop()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            self._handle_in_fork(number)
            return
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._interrupted is not None and now - self._interrupted > _PATIENCE:
                raise KeyboardInterrupt
            self._interrupted = now if self._interrupted is None else self._interrupted
        self._on_stop(signal.Signals(number).name)

    def _handle_in_fork(self, number: int) -> None:
        """Let a process that inherits this handler obey SIGTERM, by which its owner ends it; others are for the run."""
        if number == signal.SIGTERM:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


@contextmanager
def spare_children() -> Iterator[None]:
    """A context whose new processes hear no SIGINT, SIGTERM or SIGUSR1: compilers, if all of the group gets one.

    What a thread blocks its children block too. Another thread takes these signals for this process meanwhile, and
    their Python handlers run in the main thread as ever.
    """
    over = threading.Event()
    threading.Thread(target=over.wait, name="signals", daemon=True).start()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        over.set()


class _Grace:
    """Ends the process some seconds after a signal, unless it is stopped before.

    A thread listens to a pipe into which the C handler of each signal writes: the Python handler would not run while
    the main thread waits in a collective for a rank that is gone.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._pipe = (-1, -1)
        self._over = False
        self._previous = -1

    def start(self) -> None:
        """Listen."""
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        self._previous = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        _listening.add(self._pipe[1])
        threading.Thread(target=self._listen, name="grace period", daemon=True).start()

    def stop(self) -> None:
        """Listen no more."""
        _listening.discard(self._pipe[1])
        signal.set_wakeup_fd(self._previous)
        # Said, since a fork may hold the pipe open: its end would come too late.
        self._over = True
        with suppress(BlockingIOError, BrokenPipeError):  # it may know already
            os.write(self._pipe[1], b"\0")
        os.close(self._pipe[1])

    def _listen(self) -> None:
        try:
            deadline: float | None = None
            while True:
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                ready, _, _ = select.select([self._pipe[0]], [], [], left)
                if self._over:
                    return
                if not ready:
                    break
                numbers = os.read(self._pipe[0], 64)
                if deadline is None and set(numbers) & set(_STOPS):
                    deadline = time.monotonic() + self._seconds
        finally:
            os.close(self._pipe[0])
        logger.error(
            "grace_seconds=%g have passed since the signal and the step has not ended; ending at once, the last "
            "checkpoint stands",
            self._seconds,
        )
        os._exit(EXIT_PREEMPTED)


_listening: set[int] = set()


def _deaf_child() -> None:
    """A fork shares the pipe: signals to a loader's worker are not signals to the run."""
    if _listening:
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_deaf_child)
