"""Measurements on the way, by a function of the user."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from hjepa_train.protocols import Callback

if TYPE_CHECKING:
    from hjepa_train.trainer import StepResult, Trainer


class Measure(Callback):
    """Logs what a function measures before the first step, every n steps and after the last.

    Args:
        every: Steps between measurements.
        measure: Called with the trainer on every rank, the module in training mode; its scalars are the same on every
            rank. `trainer.call` reaches the module's methods wherever its weights are.
    """

    def __init__(self, every: int, measure: Callable[[Trainer], Mapping[str, float]]) -> None:
        if every < 1:
            raise ValueError(f"every={every}: too small; allowed: 1 and more")
        self.every, self.measure = every, measure

    def on_fit_start(self, trainer: Trainer) -> None:
        """Measure the untrained module; a run that goes on has done so."""
        if trainer.step == 0:
            trainer.log(self.measure(trainer))

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        """Measure, where it is time."""
        if trainer.step % self.every == 0 or trainer.step == trainer.config.steps:
            trainer.log(self.measure(trainer))
