"""Signals ask a run to finish its step and save; a second Ctrl-C ends it at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Self

_PATIENCE = 1.0
"""Seconds in which a repeated SIGINT is the same one: torchrun forwards what the terminal has already sent."""


class StopSignals:
    """A context in which SIGINT, SIGTERM and SIGUSR1 call `on_stop(name)`.

    Outside the main thread it does nothing, because Python handles signals there only.
    """

    def __init__(self, on_stop: Callable[[str], None]) -> None:
        self._on_stop = on_stop
        self._owner = os.getpid()
        self._interrupted: float | None = None
        self._previous: dict[signal.Signals, signal._HANDLER] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
        """Let a loader's worker, which inherits this handler, outlive Ctrl-C (its owner ends it) and obey the rest."""
        if number != signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
