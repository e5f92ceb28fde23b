"""Processes of a pool end with their program; those of a stream: stream/test_signals.py."""

import contextlib
import os
import signal
import subprocess
import sys

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


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the script cannot be imported by processes that are spawned")
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
