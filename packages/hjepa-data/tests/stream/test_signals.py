"""Workers whose program gets a signal, with them or alone: they go on for it, and end with it."""

import contextlib
import os
import signal
import subprocess
import sys

import pytest

GROUP_SCRIPT = """
import multiprocessing, os, signal, sys, time
if __name__ != "__main__":
    time.sleep(1)  # so that a worker which imports this is not ready when the signals come
from hjepa_data import ShardSource, StreamConfig, ViewGroup, WorkerConfig

class Sleepy(ShardSource):
    def read(self, index):
        if sys.argv[3] == "asleep" and index % 2:
            time.sleep(600)
        return super().read(index)

if __name__ == "__main__":
    if sys.argv[3] == "late":
        os.register_at_fork(after_in_child=lambda: time.sleep(2))
    workers = WorkerConfig(count=2, start_method=sys.argv[2])
    stream = StreamConfig(global_batch_size=6, views=(ViewGroup(size=(8, 8)),), workers=workers).build(
        Sleepy(sys.argv[1]), seed=3
    )
    stream._batches = stream._load()
    if sys.argv[3] == "awake":
        next(stream)
    elif sys.argv[3] == "asleep":
        time.sleep(0.5)
    children = multiprocessing.active_children()
    print(*(child.pid for child in children), flush=True)
    if sys.argv[3] == "signals":
        for _ in range(2):  # while the workers start, and while they work
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                signal.signal(number, lambda *_: None)
                os.killpg(0, number)
                time.sleep(0.2)
            for _ in range(20):
                next(stream)
        print("went on")
    if sys.argv[4] == "close":
        stream.close()
        for child in children:
            child.join(5)  # killed, it ends within a moment
        assert not any(child.is_alive() for child in children)
    if sys.argv[4] == "die":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.killpg(0, signal.SIGTERM)
"""


def group(tmp_path, shards, *words):
    """Run a program in its own process group; return its workers, what else it says, and its code."""
    script = tmp_path / "train.py"
    script.write_text(GROUP_SCRIPT)
    command = [sys.executable, script, shards, *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, **pipes, start_new_session=True) as process:
        workers = process.stdout.readline().split()
        try:
            said, _ = process.communicate(timeout=240)  # until the last worker, who holds the pipe as well, has gone
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return workers, said, process.returncode


@pytest.mark.parametrize(
    "method", ["fork", *(pytest.param(other, marks=pytest.mark.slow) for other in ("spawn", "forkserver"))]
)
def test_signals_to_the_whole_group_leave_the_workers_alone(shards, tmp_path, method):
    workers, said, code = group(tmp_path, shards, method, "signals", "exit")
    assert (len(workers), said, code) == (2, "went on\n", 0)


@pytest.mark.parametrize("end", ["exit", "close"])
def test_workers_that_are_asleep_hold_up_nobody(shards, tmp_path, end):
    workers, said, code = group(tmp_path, shards, "fork", "asleep", end)
    assert (len(workers), said, code) == (2, "", 0)


@pytest.mark.parametrize(
    ("method", "state"),
    [
        ("fork", "awake"),
        ("fork", "late"),
        ("fork", "asleep"),
        pytest.param("spawn", "awake", marks=pytest.mark.slow),
        pytest.param("forkserver", "awake", marks=pytest.mark.slow),
        pytest.param("forkserver", "asleep", marks=pytest.mark.slow),
    ],
)
def test_workers_end_after_a_program_that_a_signal_has_ended(shards, tmp_path, method, state):
    workers, said, code = group(tmp_path, shards, method, state, "die")
    assert (len(workers), code) == (2, -signal.SIGTERM)
    assert not said or method != "fork"  # Python itself counts the locks that the others leave behind
