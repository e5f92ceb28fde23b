import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hjepa_models.distributed import all_reduce_mean

SCRIPT = Path(__file__).parent / "scripts" / "two_process_step.py"


def test_one_process_is_left_alone(device):
    tensor = torch.ones(3, device=device)
    assert all_reduce_mean(tensor) is tensor


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_equal_one_in_loss_gradients_and_statistics(tmp_path):
    runs = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(rank), "2", str(tmp_path / "store"), str(tmp_path)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    runpy.run_path(str(SCRIPT))["main"](0, 1, "", str(tmp_path))
    for run in runs:
        _, errors = run.communicate(timeout=300)
        assert run.returncode == 0, errors
    for objective in ("sigreg", "vicreg"):
        one, two = (load_file(tmp_path / f"{objective}_{world}.safetensors") for world in (1, 2))
        assert one.keys() == two.keys()
        assert len(one) > 40
        for name, expected in one.items():
            torch.testing.assert_close(two[name], expected, atol=1e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
