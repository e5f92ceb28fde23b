import os

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device named by HJEPA_TEST_DEVICE; asking for CUDA where there is none is a failure, not a skip."""
    name = os.environ.get("HJEPA_TEST_DEVICE", "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        pytest.fail(f"HJEPA_TEST_DEVICE={name}: torch finds no CUDA device")
    return torch.device(name)
