import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).parents[1] / "scripts" / "several_ranks.py"


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_find_what_one_finds_with_exact_counts(tmp_path):
    runs = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(rank), "2", str(tmp_path / "store"), str(tmp_path)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        runpy.run_path(str(SCRIPT))["main"](0, 1, "", str(tmp_path))
        for run in runs:
            _, errors = run.communicate(timeout=300)
            assert run.returncode == 0, errors
    finally:
        for run in runs:
            run.kill()
            run.communicate()
    one, two = (load_file(tmp_path / f"{world}.safetensors") for world in (1, 2))
    assert one.keys() == two.keys()
    for name in sorted(one):
        if name.startswith("plain"):
            # Without numbers the rows of rank 0 come first.
            order = torch.cat([torch.arange(rank, 11, 2) for rank in range(2)])
            torch.testing.assert_close(two[name], one[name][order], msg=name)
        else:
            torch.testing.assert_close(two[name], one[name], msg=name)
    assert len(one["padded/a/mean"]) == 11
    assert len(one["lonely"]) == 1
