"""How long training stands still for checkpoints: 739 MB of state, saved every 20 of 60 steps."""

import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path

from hjepa_train import Callback, CheckpointConfig, Trainer, TrainerConfig
from hjepa_train.testing import ArithmeticStream, ToyModule

logging.basicConfig(level=logging.INFO, format="%(message)s")

WIDTH = 2048


class Stalls(Callback):
    """Prints what each save has cost but the last, which the line at the end has."""

    def on_row(self, trainer: Trainer, row: Mapping[str, float]) -> None:
        """Look into the row after a save."""
        if "checkpoint/stall_seconds" in row:
            print(f"stalled {row['checkpoint/stall_seconds']:.2f} s", flush=True)


with tempfile.TemporaryDirectory() as folder:
    saving = CheckpointConfig(every_steps=20, keep=1)
    config = TrainerConfig(steps=60, precision="fp32")
    module, stream = ToyModule(width=WIDTH), ArithmeticStream(width=WIDTH)
    Trainer(module, stream, config, run_dir=Path(folder), callbacks=[Stalls()], checkpoint=saving).fit()
