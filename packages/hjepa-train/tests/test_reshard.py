"""A checkpoint is resumed by any layout, and read by torch.distributed.checkpoint too."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hjepa_train import CheckpointStore

SCRIPT = Path(__file__).parent / "scripts" / "reshard.py"


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chain")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=550, check=False)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.distributed
def test_every_layout_goes_on_from_the_checkpoint_of_every_other(chain):
    _, report = chain
    assert report["different"] == {}
    # Each rank has written its own part.
    assert {int(name.split()[-1]) - count for name, count in report["files"].items()} == {0}
    assert {count for count in report["files"].values()} == {1, 2, 4}


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_distributed_checkpoint_reads_the_parts(chain):
    from torch.distributed import checkpoint as dcp

    folder, _ = chain
    for step in (2, 5, 8):  # four shards; two shards in two copies; four ranks with a share each
        saved = CheckpointStore(folder / "chain" / "checkpoints").at(step)
        tensors = saved.tensors()
        names = [name for name in tensors if name.startswith("model/") or name.endswith("exp_avg")]
        read = {name: torch.zeros(tensors.shapes[name], dtype=tensors[name].dtype) for name in names}
        dcp.load(read, storage_reader=dcp.HuggingFaceStorageReader(str(saved.path)))
        assert len(names) > 30
        assert all(torch.equal(read[name], tensors[name]) for name in names)
