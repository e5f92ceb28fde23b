"""Stop in time on a machine that is lent for a while."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from hjepa_train.callbacks.progress import duration
from hjepa_train.protocols import Callback

if TYPE_CHECKING:
    from hjepa_train.trainer import StepResult, Trainer


class TimeLimit(Callback):
    """Asks for a stop (step finished, checkpoint saved, outcome `PREEMPTED`) after a number of minutes.

    Args:
        minutes: Since `started`; leave a minute for the last checkpoint.
        started: A `time.monotonic()` at which the clock began; None means when `fit` starts.
    """

    def __init__(self, minutes: float, *, started: float | None = None) -> None:
        if not minutes > 0.0:
            raise ValueError(f"minutes={minutes}: not positive; allowed: above 0, or no TimeLimit at all")
        self.minutes = minutes
        self._started = started

    def on_fit_start(self, trainer: Trainer) -> None:
        """Start the clock, unless it runs already."""
        self._started = time.monotonic() if self._started is None else self._started

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        """Ask, where it is time."""
        assert self._started is not None
        if time.monotonic() - self._started >= 60.0 * self.minutes:
            trainer.request_stop(f"time limit of {duration(60.0 * self.minutes)}")
