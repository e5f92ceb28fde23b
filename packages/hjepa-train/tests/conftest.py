"""Fixtures of the trainer's tests."""

import os

import pytest
import torch

from hjepa_train import CheckpointConfig, ParallelConfig, Trainer, TrainerConfig
from hjepa_train.testing import ArithmeticStream, ToyModule


@pytest.fixture
def device() -> torch.device:
    """The device of `HJEPA_TEST_DEVICE`; a GPU that is asked for and missing is a failure, not a skip."""
    name = os.environ.get("HJEPA_TEST_DEVICE", "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.fail("HJEPA_TEST_DEVICE=cuda: no CUDA device is visible")
    return torch.device(name)


@pytest.fixture
def train(device):
    """Train a toy with these callbacks, and return its trainer."""

    def run(callbacks, *, steps=6, run_dir=None):
        config = TrainerConfig(steps=steps, log_every=2, precision="fp32", parallel=ParallelConfig(device=device.type))
        trainer = Trainer(
            ToyModule(),
            ArithmeticStream(),
            config,
            run_dir=run_dir,
            callbacks=callbacks,
            checkpoint=CheckpointConfig(every_steps=2),
        )
        trainer.fit()
        return trainer

    return run
