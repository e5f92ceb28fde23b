"""One process, two by DDP, two by FSDP2 and accumulated gradients train the real model alike, twenty steps long."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).parent / "scripts" / "layouts.py"
TABLES = runpy.run_path(str(SCRIPT))
PAIRS = [(case, layout) for layout, (*_, cases, _) in TABLES["LAYOUTS"].items() for case in cases if layout != "single"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(SCRIPT), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=550, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("case", "layout"), PAIRS, ids=[f"{case}: {layout}" for case, layout in PAIRS])
def test_every_layout_trains_like_one_process(runs, case, layout):
    mine, alone = (json.loads((runs / case / f"{name}.json").read_text()) for name in (layout, "single"))
    assert len(mine) == len(alone) == 20
    for name in alone[-1]:
        # The gradient is a sum of terms that nearly cancel: its norm has fewer digits than the loss.
        tolerance = 1e-3 if name == "train/grad_norm" else 2e-5
        expected = [row[name] for row in alone if name in row]
        assert [row[name] for row in mine if name in row] == pytest.approx(expected, rel=tolerance, abs=1e-7), name
    most = TABLES["load"](case).trainer.clip_norm
    assert max(row["train/grad_norm"] for row in alone) > most, "nothing was clipped"
    weights, expected = (load_file(runs / case / f"{name}.safetensors") for name in (layout, "single"))
    assert weights.keys() == expected.keys()
    for name, weight in expected.items():
        if name.endswith("level_averages.count"):
            continue  # of micro-batches
        torch.testing.assert_close(weights[name], weight, rtol=1e-5, atol=5e-6, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("case", TABLES["CASES"])
def test_there_was_something_to_compare(runs, case):
    """Every learned tensor has moved by more than the tolerance, the target branch too."""
    trained = load_file(runs / case / "single.safetensors")
    untrained = TABLES["build_task"](TABLES["load"](case)).state_dict()
    still = {name for name, value in untrained.items() if (trained[name] - value).abs().max() < 2e-5}
    allowed = ("positions", "frequencies", "projector.0.bias")  # the bias stands before a batch norm
    assert {name for name in still if not any(word in name for word in allowed)} == set()
