"""A grace period ends a run that hangs after a signal; one that stops in time is left alone."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from hjepa_train import EXIT_PREEMPTED
from hjepa_train.signals import StopSignals

HANGING = """
import os, signal, sys, threading, time
from hjepa_train.signals import StopSignals
with StopSignals(lambda name: None, 0.4):
    threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    lock = threading.Lock(); lock.acquire()
    {hang}
"""


# What waits in C never comes back to the interpreter, as a collective whose other ranks are gone.
IN_C = """
    import ctypes
    libc, mutex = ctypes.CDLL(None), (ctypes.c_char * 64)()
    libc.pthread_mutex_init(mutex, None); libc.pthread_mutex_lock(mutex); libc.pthread_mutex_lock(mutex)
"""


@pytest.mark.parametrize("hang", ["time.sleep(600)", IN_C], ids=["in Python", "in C"])
def test_a_run_that_hangs_ends_after_its_grace_period(hang):
    command = [sys.executable, "-c", HANGING.format(hang=hang.strip())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == EXIT_PREEMPTED, done.stderr
    assert "grace_seconds=0.4 have passed" in done.stderr


def test_a_run_that_stops_in_time_is_left_alone():
    before = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(before)
    names, others = [], set(threading.enumerate())
    with StopSignals(names.append, 300.0):
        (thread,) = set(threading.enumerate()) - others
        os.kill(os.getpid(), signal.SIGUSR1)
    thread.join(60)
    assert not thread.is_alive()
    assert names == ["SIGUSR1"]
    assert signal.set_wakeup_fd(before) == before


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_signal_to_a_fork_starts_no_grace_period():
    with StopSignals(lambda name: None, 0.2):
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGTERM, lambda *_: os._exit(7))
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
            os._exit(8)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        time.sleep(0.5)  # longer than the grace period: this process would be gone
