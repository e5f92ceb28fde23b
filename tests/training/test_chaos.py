"""A run of two ranks that is killed at random moments, saves among them, ends like one that was left alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "scripts" / "chaos.py"


@pytest.mark.slow
@pytest.mark.distributed
def test_twenty_sigkills_change_no_bit(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(SCRIPT), str(tmp_path), "0"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=550, check=False)
    assert done.returncode == 0, done.stderr
    reports = json.loads(done.stdout.splitlines()[-1])
    assert {kind: report["killed"] for kind, report in reports.items()} == {"ddp": 14, "fsdp": 6}
    for report in reports.values():
        assert report["slowest end of a rank left alone"] < 300  # gloo itself waits for half an hour
        assert report["damaged"] == []
        assert report["same losses"]
        assert report["same weights"]
        assert report["left over"] == []
