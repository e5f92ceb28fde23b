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

    It asks before, where callbacks above it in the list have announced work after the next step that would take longer
    than that; a run that begins with such a step does it.

    Args:
        minutes: Since `started`; leave room for a step and the last checkpoint.
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
        left = self._started + 60.0 * self.minutes - time.monotonic()
        if left <= trainer.announced_seconds:
            ahead = "" if left <= 0.0 else f", which work of {duration(trainer.announced_seconds)} ahead would pass"
            trainer.request_stop(f"time limit of {duration(60.0 * self.minutes)}{ahead}")
