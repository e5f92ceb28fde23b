"""The learning-rate finder: a sweep over rates on the real task, and what it suggests."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from torch import nn

from hjepa_train.errors import TrainingError
from hjepa_train.guard import GuardConfig
from hjepa_train.outcome import Outcome
from hjepa_train.protocols import Callback, Cyclic, Stream
from hjepa_train.schedules import ScheduleConfig, ScheduleKind

if TYPE_CHECKING:
    from hjepa_train.config import TrainerConfig
    from hjepa_train.parallel import World
    from hjepa_train.trainer import Trainer

_SMOOTHING = 0.9
"""Share of the past in the smoothed loss."""
_DIVERGED = 2.0
"""The sweep ends where the smoothed loss is above its least by this many times what it had fallen from the first."""


class SweepStoppedError(TrainingError):
    """A signal or a time limit has stopped a sweep: nothing is wrong, and nothing is known."""


@dataclass(kw_only=True, slots=True, frozen=True)
class RateSweep:
    """What a sweep has seen."""

    rates: npt.NDArray[np.float64]
    """Learning rate of each step, rising by equal factors."""
    losses: npt.NDArray[np.float64]
    """Loss of each step, averaged over ranks."""

    @property
    def smoothed(self) -> npt.NDArray[np.float64]:
        """The losses' moving average, without the bias of its start: s_n = (1 - b) sum_k b^(n-k) l_k / (1 - b^n)."""
        return smooth(self.losses)

    @property
    def suggestion(self) -> float | None:
        """The rate at which the smoothed loss falls fastest by the logarithm of the rate; None where it never falls.

        Source: Smith, arXiv 1506.01186, section 3.3, with the slope in place of the eye.
        """
        if not len(self.losses):
            return None
        smoothed = self.smoothed
        low = int(smoothed.argmin())
        # The first steps fall because anything does: the average has not settled there.
        first = min(len(self.rates) // 10, max(0, low - 1))
        if low - first < 2:
            return None
        slopes = np.gradient(smoothed[first : low + 1], np.log(self.rates[first : low + 1]))
        return float(self.rates[first + int(slopes.argmin())]) if slopes.min() < 0.0 else None


def smooth(losses: Sequence[float] | npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the moving average of losses, with the bias of its start taken out.

    >>> smooth([2.0, 2.0, 2.0]).round(6).tolist()
    [2.0, 2.0, 2.0]
    """
    average, found = 0.0, []
    for count, loss in enumerate(losses, start=1):
        average = _SMOOTHING * average + (1.0 - _SMOOTHING) * loss
        found.append(average / (1.0 - _SMOOTHING**count))
    return np.array(found)


def find_rate(
    module: nn.Module,
    stream: Stream,
    config: TrainerConfig,
    *,
    low: float = 1e-6,
    high: float = 1.0,
    steps: int = 100,
    place: int = 0,
    world: World | None = None,
    blocks: Sequence[type[nn.Module]] = (),
    callbacks: Sequence[Callback] = (),
) -> RateSweep:
    """Train for some steps while the learning rate rises from `low` to `high` by equal factors; nothing is saved.

    Weight decay and EMA momentum are those of the run's first step throughout.

    It ends early where the loss is not finite or has left its least value far behind. The module has been trained
    afterwards, and the stream has moved on: throw both away. Where targets move with the module (EMA), a falling loss
    is no proof of learning; the sweep then mostly tells the rate from which on it diverges.

    Args:
        module: As for a Trainer.
        stream: Likewise.
        config: Of the run; its own learning rate is not used.
        low: First learning rate.
        high: Last one.
        steps: Optimizer steps of the sweep.
        place: Step of the run at which the module begins, e.g. one where every level has come in: a loss that changes
            by design is none that diverges. A module with a `cycle` does the steps of the kind of this one alone.
        world: As for a Trainer.
        blocks: Likewise.
        callbacks: Likewise, e.g. a ProgressBar or a TimeLimit.

    Raises:
        ValueError: Where low and high leave nothing to sweep.
        SweepStoppedError: Where a signal or a callback has stopped it before its end.
    """
    from hjepa_train.trainer import Trainer

    if not 0.0 < low < high < math.inf or steps < 10:
        raise ValueError(f"low={low}, high={high}, steps={steps}: no sweep; allowed: 0 < low < high, 10 steps and more")
    rising = ScheduleConfig(kind=ScheduleKind.exponential, value=low, final=high, steps=steps - 1)
    sweep = replace(
        config,
        steps=steps,
        learning_rate=rising,
        weight_decay=_first(config.weight_decay, config),
        ema_momentum=_first(config.ema_momentum, config),
        log_every=1,
        guard=GuardConfig(max_skips=steps, spike=None),
    )
    record = _Record()
    trainer = Trainer(module, stream, sweep, world=world, blocks=blocks, callbacks=[record, *callbacks])
    cycle = module.cycle if isinstance(module, Cyclic) else 1
    trainer.module_step = lambda step: place + cycle * step
    if trainer.fit() is Outcome.PREEMPTED:
        raise SweepStoppedError(f"the sweep was stopped after step {trainer.step} of {steps}; start it again")
    return RateSweep(rates=np.array(record.rates), losses=np.array(record.losses))


def _first(schedule: ScheduleConfig, config: TrainerConfig) -> ScheduleConfig:
    """Stay at the first value: over the steps of the sweep the schedule would run from end to end."""
    return ScheduleConfig(value=schedule.build(config.length)(0))


class _Record(Callback):
    """Keeps rate and loss of each step, and ends the sweep where the loss has gone."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.losses: list[float] = []

    def on_row(self, trainer: Trainer, row: Mapping[str, float]) -> None:
        loss = row["train/loss"]
        if not math.isfinite(loss):
            trainer.request_end("the loss is not finite")
            return
        self.rates.append(row["train/lr"])
        self.losses.append(loss)
        smoothed = smooth(self.losses)
        least = float(smoothed.min())
        fall = max(float(smoothed[0]) - least, 0.05 * abs(least))
        if len(smoothed) > trainer.config.steps // 10 and smoothed[-1] > least + _DIVERGED * fall:
            trainer.request_end("the loss has diverged")
