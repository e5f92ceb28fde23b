"""How long training stands still for checkpoints: 739 MB of state, saved every 20 of 60 steps."""

import logging
import tempfile
from pathlib import Path

from hjepa_train import CheckpointConfig, Trainer, TrainerConfig
from hjepa_train.testing import ArithmeticStream, ToyModule

logging.basicConfig(level=logging.INFO, format="%(message)s")

WIDTH = 2048


with tempfile.TemporaryDirectory() as folder:
    saving = CheckpointConfig(every_steps=20, keep=1)
    config = TrainerConfig(steps=60, precision="fp32")
    module, stream = ToyModule(width=WIDTH), ArithmeticStream(width=WIDTH)
    Trainer(module, stream, config, run_dir=Path(folder), checkpoint=saving).fit()
