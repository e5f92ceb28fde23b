"""A grace period ends a run that hangs after a signal; one that stops in time is left alone."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from hjepa_train import EXIT_PREEMPTED
from hjepa_train.signals import StopSignals, spare_children

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


TRAINING = """
import os, signal, sys, time
from pathlib import Path
from hjepa_train import Callback, CheckpointConfig, Trainer, TrainerConfig
from hjepa_train.testing import ArithmeticStream, ToyModule

class Hang(Callback):
    def on_step_end(self, trainer, result):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(600)

config, saving = TrainerConfig(steps=6, precision="fp32"), CheckpointConfig(grace_seconds=0.3)
Trainer(ToyModule(), ArithmeticStream(), config, run_dir=Path("run"), callbacks=[Hang()], checkpoint=saving).fit()
"""


def test_the_grace_period_of_a_run_is_that_of_its_checkpoints(tmp_path):
    command = [sys.executable, "-c", TRAINING]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == EXIT_PREEMPTED, done.stderr
    assert "grace_seconds=0.3 have passed" in done.stderr


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


COMPILING = """
import os, signal, subprocess, sys
from pathlib import Path
from torch._dynamo import register_backend
from hjepa_train import Trainer, TrainerConfig
from hjepa_train.testing import ArithmeticStream, ToyModule

@register_backend
def outside(graph, inputs):
    compiler = subprocess.Popen(["sleep", "0.5"])
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        os.killpg(0, number)
    assert compiler.wait() == 0, "the compiler was ended"
    return graph.forward

config = TrainerConfig(steps=6, precision="fp32", compile=True, compile_backend="outside")
sys.exit(Trainer(ToyModule(), ArithmeticStream(), config, run_dir=Path(sys.argv[1])).fit().exit_code)
"""


def test_a_signal_to_the_whole_group_leaves_compilers_alone(tmp_path):
    command = [sys.executable, "-c", COMPILING, str(tmp_path)]
    done = subprocess.run(command, start_new_session=True, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == EXIT_PREEMPTED, done.stderr
    assert (tmp_path / "checkpoints" / "step_00000001").is_dir()


def test_processes_hear_signals_again_once_none_are_spared():
    with spare_children():
        pass
    names = []
    with StopSignals(names.append):
        os.kill(os.getpid(), signal.SIGTERM)
    assert names == ["SIGTERM"]
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())


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


FORKING = """
import os, signal, time
from hjepa_train.signals import StopSignals
with StopSignals(lambda name: None, 3.0):
    worker = os.fork()
    if worker == 0:
        os.closerange(1, 3)  # the pipes of who waits for this program
        time.sleep(60)
    os.kill(os.getpid(), signal.SIGTERM)
time.sleep(5)
os.kill(worker, signal.SIGKILL)
"""


def test_a_run_that_has_stopped_is_left_alone_whatever_its_forks_hold():
    # Python 3.12 and later warn of forks beside the threads that torch has.
    quiet = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKING]
    done = subprocess.run(quiet, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, "")
