import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hjepa_models.distributed import all_gather_rows, all_reduce_mean, rank, world_size

SCRIPTS = Path(__file__).parent / "scripts"


def test_one_process_is_left_alone(device):
    tensor = torch.ones(3, device=device)
    assert all_reduce_mean(tensor) is tensor
    assert all_gather_rows(tensor) is tensor
    assert (rank(), world_size()) == (0, 1)


def run(script, tmp_path):
    """Run a script as two processes, and as one in this process."""
    path = SCRIPTS / script
    runs = [
        subprocess.Popen(
            [sys.executable, str(path), str(number), "2", str(tmp_path / "store"), str(tmp_path)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    try:
        runpy.run_path(str(path))["main"](0, 1, "", str(tmp_path))
        for process in runs:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors
    finally:
        for process in runs:
            process.kill()
            process.communicate()


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_equal_one_in_loss_gradients_and_statistics(tmp_path):
    run("two_process_step.py", tmp_path)
    for step in ("sigreg", "vicreg", "nt_xent", "view", "drawn"):
        one, two = (load_file(tmp_path / f"{step}_{world}.safetensors") for world in (1, 2))
        assert one.keys() == two.keys()
        assert len(one) > 40
        for name, expected in one.items():
            torch.testing.assert_close(two[name], expected, atol=1e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
@pytest.mark.distributed
def test_every_objective_over_two_processes_equals_one(tmp_path):
    run("two_process_objectives.py", tmp_path)
    one, two = (load_file(tmp_path / f"objectives_{world}.safetensors") for world in (1, 2))
    assert one.keys() == two.keys()
    assert len(one) > 35
    for name, expected in one.items():
        assert expected.any(), f"{name}: nothing to compare"
        torch.testing.assert_close(two[name], expected, atol=1e-9, rtol=1e-7, msg=lambda m, n=name: f"{n}: {m}")
