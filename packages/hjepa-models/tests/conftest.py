import os

import pytest
import torch
from hypothesis import settings

settings.register_profile("house", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("house")


@pytest.fixture(scope="session")
def device() -> torch.device:
    name = os.environ.get("HJEPA_TEST_DEVICE", "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        pytest.fail(f"HJEPA_TEST_DEVICE={name}, but there is no CUDA device")
    # A GPU's convolutions are compared with a CPU's.
    torch.backends.cudnn.allow_tf32 = False
    return torch.device(name)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
