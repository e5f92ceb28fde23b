"""`torchrun` starts a run again whose rank was killed, and it goes on from its newest checkpoint."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "scripts" / "elastic.py"


@pytest.mark.slow
@pytest.mark.distributed
def test_a_killed_rank_is_started_again_and_the_run_goes_on(tmp_path):
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *launch, str(SCRIPT), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    lives = [json.loads(line) for line in (tmp_path / "lives.jsonl").read_text().splitlines()]
    # The checkpoint of step 4 is on the disk at step 5, or was still being written when the rank died.
    assert [life["restart"] for life in lives] == [0, 1]
    assert lives[0]["from step"] == 0
    assert lives[1]["from step"] in (2, 4)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 9))
