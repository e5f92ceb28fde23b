"""What every test that crosses packages may use."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Device of HJEPA_TEST_DEVICE (default cpu); a CUDA device that was asked for and is not there is a failure."""
    import torch

    name = os.environ.get("HJEPA_TEST_DEVICE", "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.fail("HJEPA_TEST_DEVICE=cuda: torch sees no CUDA device")
    return torch.device(name)
