"""Processes that work for a program, and end with it."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time

__all__ = ["end_with_program"]

_LOOK = 1.0


def end_with_program(method: str) -> None:
    """Let this process end, whatever it does, within a second or two after the program that it works for has gone.

    A program that SIGKILL or the want of memory ends cannot end its workers. Those of a ``ProcessPoolExecutor`` stay
    for ever; torch's own watch over the workers of a ``DataLoader`` misses one that still starts when the program goes,
    and one that waits for its disk.

    Args:
        method: how this process was started: "fork", "spawn" or "forkserver".
    """
    threading.Thread(target=_watch, args=(method,), daemon=True).start()


def _watch(method: str) -> None:
    program = multiprocessing.parent_process()
    if program is None:
        return
    # Forked workers hold each other's pipes to the program open; those of a fork server have another parent.
    while os.getppid() == program.pid if method == "fork" else program.is_alive():
        time.sleep(_LOOK)
    os._exit(1)
