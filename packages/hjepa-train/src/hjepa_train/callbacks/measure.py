"""Measurements on the way, by a function of the user."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from hjepa_train.protocols import Callback

if TYPE_CHECKING:
    from hjepa_train.trainer import StepResult, Trainer


class Measure(Callback):
    """Logs what a function measures before the first step, every n steps and after the last.

    A `TimeLimit` further down the list of callbacks stops at the step before a measurement for which there is no time,
    by what the last one took.

    Args:
        every: Steps between measurements.
        measure: Called with the trainer on every rank, the module in training mode; its scalars are the same on every
            rank. `trainer.call` reaches the module's methods wherever its weights are.
    """

    def __init__(self, every: int, measure: Callable[[Trainer], Mapping[str, float]]) -> None:
        if every < 1:
            raise ValueError(f"every={every}: too small; allowed: 1 and more")
        self.every, self.measure = every, measure
        self._seconds = 0.0

    def on_fit_start(self, trainer: Trainer) -> None:
        """Measure the untrained module; a run that goes on has done so."""
        if trainer.step == 0:
            self._log(trainer)

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        """Measure, where it is time; announce a measurement after the next step."""
        if self._is_due(trainer, trainer.step):
            self._log(trainer)
        if self._is_due(trainer, trainer.step + 1):
            trainer.announce(self._seconds)

    def state_dict(self) -> dict[str, Any]:
        """Return how long the last measurement took."""
        return {"seconds": self._seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it over."""
        self._seconds = state["seconds"]

    def _is_due(self, trainer: Trainer, step: int) -> bool:
        return step % self.every == 0 or step == trainer.config.steps

    def _log(self, trainer: Trainer) -> None:
        began = time.monotonic()
        trainer.log(self.measure(trainer))
        self._seconds = time.monotonic() - began
