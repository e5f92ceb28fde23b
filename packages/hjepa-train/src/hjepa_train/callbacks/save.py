"""When checkpoints are written."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from hjepa_train.checkpoint import CheckpointConfig
from hjepa_train.protocols import Callback

if TYPE_CHECKING:
    from hjepa_train.trainer import StepResult, Trainer


class SaveEvery(Callback):
    """Asks for a checkpoint by steps and by minutes; the trainer adds it by itself."""

    def __init__(self, config: CheckpointConfig) -> None:
        self.config = config
        self._saved_at = time.monotonic()

    def on_fit_start(self, trainer: Trainer) -> None:
        """Start the clock."""
        self._saved_at = time.monotonic()

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        """Ask, where it is time."""
        minutes, cadences = self.config.every_minutes, (self.config.every_steps, self.config.keep_every_steps)
        due = any(steps is not None and trainer.step % steps == 0 for steps in cadences)
        if due or (minutes is not None and time.monotonic() - self._saved_at >= 60.0 * minutes):
            trainer.request_save()

    def on_save(self, trainer: Trainer) -> None:
        """Start the clock again."""
        self._saved_at = time.monotonic()
