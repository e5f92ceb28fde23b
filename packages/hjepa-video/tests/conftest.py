import os
from pathlib import Path

import pytest
import torch

from hjepa_video import list_clips
from hjepa_video.testing import write_moving_clip


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device named by HJEPA_TEST_DEVICE; asking for CUDA where there is none is a failure, not a skip."""
    name = os.environ.get("HJEPA_TEST_DEVICE", "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        pytest.fail(f"HJEPA_TEST_DEVICE={name}: torch finds no CUDA device")
    return torch.device(name)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A folder with three short videos of one moving texture each."""
    root = tmp_path_factory.mktemp("clips")
    for seed, suffix in enumerate((".mp4", ".mkv", ".avi")):
        write_moving_clip(root / f"pan{seed}{suffix}", seed=seed)
    return root


@pytest.fixture(scope="session")
def clips(folder) -> list[Path]:
    """The videos of the folder, and those of the folder that HJEPA_TEST_CLIPS names."""
    own = os.environ.get("HJEPA_TEST_CLIPS")
    return list_clips(folder) + (list_clips(own) if own else [])
