"""Fixtures of the trainer's tests."""

import os

import pytest
import torch


@pytest.fixture
def device() -> torch.device:
    """The device of `HJEPA_TEST_DEVICE`; a GPU that is asked for and missing is a failure, not a skip."""
    name = os.environ.get("HJEPA_TEST_DEVICE", "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.fail("HJEPA_TEST_DEVICE=cuda: no CUDA device is visible")
    return torch.device(name)
