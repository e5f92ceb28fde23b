"""Stop where a measurement no longer gets better."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from hjepa_train.errors import choice
from hjepa_train.protocols import Callback

if TYPE_CHECKING:
    from hjepa_train.outcome import Outcome
    from hjepa_train.trainer import Trainer

logger = logging.getLogger(__name__)


class StopMode(StrEnum):
    """Which way is better."""

    max = "max"
    min = "min"


@dataclass(kw_only=True, slots=True)
class EarlyStopConfig:
    """Which measurement ends a run that it no longer rewards."""

    metric: str
    """Name in the rows, e.g. `eval/encoder/knn_20`; the loss of a JEPA says little."""
    mode: StopMode = StopMode.max
    """Whether more (`max`) or less (`min`) is better."""
    patience: int = 5
    """Readings of the metric in a row that are no better than the best before the run ends."""
    min_delta: float = 0.0
    """By how much a reading must be better to count."""

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        self.mode = choice(StopMode, "mode", self.mode)
        if self.patience < 1:
            raise ValueError(f"patience={self.patience}: too small; allowed: 1 and more")
        if not 0.0 <= self.min_delta < math.inf:
            raise ValueError(f"min_delta={self.min_delta}: no difference; allowed: 0 and more")
        if not self.metric:
            raise ValueError("metric='': names nothing; allowed: a name in the rows, e.g. eval/encoder/knn_20")


class EarlyStop(Callback):
    """Ends a run as done, with everything saved, after `patience` readings without a better one.

    The same command does not train on: the checkpoint remembers. It does where patience has been raised.

    Args:
        config: Which metric, and how long to wait.
    """

    def __init__(self, config: EarlyStopConfig) -> None:
        self.config = config
        self._best: float | None = None
        self._best_step = 0
        self._waited = 0
        self._seen = self._told = False
        self._before: tuple[str, str] | None = None

    def on_fit_start(self, trainer: Trainer) -> None:
        """End at once where the run has ended before; say so where it looked at another metric before."""
        if self._before is not None and trainer.world.is_main:
            text = "early stop: begins anew with metric=%s, mode=%s; the checkpoint has metric=%s, mode=%s"
            logger.info(text, self.config.metric, self.config.mode, *self._before)
        self._judge(trainer)

    def on_row(self, trainer: Trainer, row: Mapping[str, float]) -> None:
        """Take a reading, where the row has one."""
        if self.config.metric not in row:
            self._tell_others(trainer, row)
            return
        self._seen = True
        value = row[self.config.metric]
        sign = 1.0 if self.config.mode is StopMode.max else -1.0
        if math.isfinite(value) and (self._best is None or sign * (value - self._best) > self.config.min_delta):
            self._best, self._best_step, self._waited = value, int(row["step"]), 0
        else:
            self._waited += 1
        self._judge(trainer)

    def on_fit_end(self, trainer: Trainer, outcome: Outcome | None) -> None:
        """Say so where a whole run never had the metric."""
        if outcome == "done" and not self._seen and self._best is None and trainer.world.is_main:
            logger.warning("early stop: no row had metric=%s; metrics.jsonl has the names", self.config.metric)

    def state_dict(self) -> dict[str, Any]:
        """Return the best reading, how long it has stood, and of what it is."""
        which = {"metric": self.config.metric, "mode": self.config.mode.value}
        return {**which, "best": self._best, "best_step": self._best_step, "waited": self._waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them over, unless they are of another metric or mode."""
        mine = (self.config.metric, self.config.mode.value)
        # Earlier checkpoints do not say of what they are.
        saved = (state.get("metric", mine[0]), state.get("mode", mine[1]))
        if saved != mine:
            self._before = saved
            return
        self._best, self._best_step, self._waited = state["best"], state["best_step"], state["waited"]

    def _tell_others(self, trainer: Trainer, row: Mapping[str, float]) -> None:
        prefix = self.config.metric.rpartition("/")[0] + "/"
        others = [name for name in row if name.startswith(prefix)]
        if others and not (self._told or self._seen or self._best is not None):
            self._told = True
            if trainer.world.is_main:
                text = "step %d: early stop: metric=%s is not among what this row has: %s"
                logger.warning(text, int(row["step"]), self.config.metric, ", ".join(others))

    def _judge(self, trainer: Trainer) -> None:
        if self._waited >= self.config.patience:
            best = "none" if self._best is None else f"{self._best:.4g} at step {self._best_step}"
            trainer.request_end(f"{self.config.metric} no better in {self._waited} readings than {best}")
