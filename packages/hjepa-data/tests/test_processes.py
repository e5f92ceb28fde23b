"""Processes of a pool end with their program; those of a stream: stream/test_signals.py."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

SCRIPT = """
import os, signal, time
from hjepa_data.shards.pool import map_in_order

def work(task):
    if task == 1:
        time.sleep(600)
    return os.getpid()

results = map_in_order(work, range(40), workers=2)
print(next(results), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""

INTERRUPTED = """
import signal, time
from pathlib import Path
from hjepa_data.shards.pool import map_in_order

# Ignored where a shell runs the tests in the background.
signal.signal(signal.SIGINT, signal.default_int_handler)

def work(task):
    part = Path(f"{task}.part")
    try:
        part.touch()
        time.sleep(0 if task == 0 else 600)
    finally:
        time.sleep(1)
        part.unlink(missing_ok=True)

try:
    list(map_in_order(work, range(40), workers=2))
except KeyboardInterrupt:
    print("interrupted", [path.name for path in Path().glob("*.part")])
"""

IGNORED = """
import os, signal, time
from hjepa_data.shards.pool import map_in_order

def work(task):
    if task == 1:
        os.killpg(os.getpgrp(), signal.SIGINT)
    return task

signal.signal(signal.SIGINT, signal.SIG_IGN)
print(list(map_in_order(work, range(5), workers=2)))
"""


forks = pytest.mark.skipif(
    not hasattr(os, "fork"), reason="the script cannot be imported by processes that are spawned"
)


@forks
@pytest.mark.parametrize(("told", "times"), [("program", 1), ("all", 1), ("all", 2), ("all", 3)])
def test_tasks_of_a_pool_tidy_up_when_they_are_interrupted(tmp_path, told, times):
    """Those that are queued do not begin, and who is impatient (three times) does not wait for those that do."""
    script = tmp_path / "pool.py"
    script.write_text(INTERRUPTED)
    with subprocess.Popen(
        [sys.executable, script],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            deadline = time.monotonic() + 120
            while not (tmp_path / "1.part").exists() or not (tmp_path / "2.part").exists():
                assert time.monotonic() < deadline
                time.sleep(0.01)
            for _ in range(times):
                (os.kill if told == "program" else os.killpg)(process.pid, signal.SIGINT)
                time.sleep(0.1)
            said, wrong = process.communicate(timeout=60)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert (wrong, process.returncode) == ("", 0)
    if times < 3:
        assert said == "interrupted []\n"
        assert not [*tmp_path.glob("*.part")]


@forks
def test_what_a_shell_runs_in_the_background_is_not_interrupted(tmp_path):
    script = tmp_path / "pool.py"
    script.write_text(IGNORED)
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, start_new_session=True, timeout=120, check=False
    )
    assert (done.stdout, done.stderr, done.returncode) == ("[0, 1, 2, 3, 4]\n", "", 0)


@forks
def test_a_pool_ends_with_its_program(tmp_path):
    script = tmp_path / "pool.py"
    script.write_text(SCRIPT)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen([sys.executable, script], **pipes, start_new_session=True) as process:
        try:
            said, _ = process.communicate(timeout=120)  # until the last process, which holds the pipe as well, has gone
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert int(said) != process.pid
    assert process.returncode == -signal.SIGKILL
