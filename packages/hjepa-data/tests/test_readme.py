"""The README's example runs as it stands."""

import re
import subprocess
import sys
from pathlib import Path

import hjepa_data

README = Path(__file__).parents[1] / "README.md"


def test_example_runs(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        result = subprocess.run(
            [sys.executable, "-W", "error", "-c", block],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert result.returncode == 0, result.stderr


def test_everything_public_is_importable():
    assert sorted(hjepa_data.__all__, key=lambda name: (not name.isupper(), name)) == hjepa_data.__all__
    for name in hjepa_data.__all__:
        assert getattr(hjepa_data, name).__doc__ or name.isupper()
