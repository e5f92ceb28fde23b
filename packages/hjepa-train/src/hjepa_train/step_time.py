"""How long a step takes, for a run whose length is to follow from its time."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from hjepa_train.outcome import Outcome
from hjepa_train.protocols import Callback, Stream
from hjepa_train.schedules import ScheduleConfig

if TYPE_CHECKING:
    from hjepa_train.config import TrainerConfig
    from hjepa_train.parallel import World
    from hjepa_train.trainer import StepResult, Trainer

_UNCOUNTED = 3
"""Cycles before any is timed: in the first graphs are compiled, in the second those of CUDA are recorded, and the third
tells how many there is time for."""
_NO_END = 1_000_000_000


@dataclass(kw_only=True, slots=True, frozen=True)
class StepTime:
    """What was timed."""

    seconds: float
    """Wall time of an optimizer step, waiting for its batch included: mean over the run, of the slowest rank."""
    steps: int
    """Timed steps."""


def time_steps(
    module: nn.Module,
    stream: Stream,
    config: TrainerConfig,
    *,
    seconds: float,
    places: Mapping[int, float],
    cycle: int = 1,
    prepared: int = 0,
    world: World | None = None,
    blocks: Sequence[type[nn.Module]] = (),
    callbacks: Sequence[Callback] = (),
) -> StepTime | None:
    """Train at a learning rate of 0, which costs what any rate costs, and tell how long a step takes; nothing is saved.

    The first cycles of each place are not timed, nor are the batches that loaders prepared while those were compiled.
    Throw the stream away afterwards, and the module: they have moved on.

    Args:
        module: As for a Trainer.
        stream: Likewise.
        config: Of the run; its length and its learning rate are not used.
        seconds: How long to time; whole cycles are, at least one of each place.
        places: The steps of the run at which its cost is taken, with the share of the run that costs as much from there
            on; the shares sum to 1.
        cycle: Steps after which their kinds begin anew.
        prepared: Batches that loaders hold ready, in optimizer steps.
        world: As for a Trainer.
        blocks: Likewise.
        callbacks: Likewise, e.g. a TimeLimit.

    Returns:
        The time of a step, the same on every rank; None where a signal or a callback has stopped the work.
    """
    from hjepa_train.trainer import Trainer

    still = replace(config, steps=_NO_END, learning_rate=ScheduleConfig(value=0.0))
    clock = _Clock(seconds, places, cycle, prepared)
    outcome = Trainer(module, stream, still, world=world, blocks=blocks, callbacks=[clock, *callbacks]).fit()
    return None if outcome is Outcome.PREEMPTED else clock.found


class _Clock(Callback):
    """Leads the trainer from place to place, and reads the time where the device has nothing left to do."""

    def __init__(self, seconds: float, places: Mapping[int, float], cycle: int, prepared: int) -> None:
        self._seconds, self._places, self._cycle, self._prepared = seconds, places, cycle, prepared
        self._steps: Iterator[None] = iter(())
        self.found: StepTime | None = None

    def on_fit_start(self, trainer: Trainer) -> None:
        self._steps = self._work(trainer)
        next(self._steps)

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        next(self._steps, None)

    def _work(self, trainer: Trainer) -> Iterator[None]:
        """Yield where the next step is to be done."""
        world, lengths = trainer.world, {}
        for place in self._places:
            trainer.step = place
            yield from self._idle((_UNCOUNTED - 1) * self._cycle)
            began = _now(world.device)
            yield from self._idle(self._cycle)
            lengths[place] = _now(world.device) - began
        yield from self._idle(self._prepared)
        mean, timed = 0.0, 0
        for place, share in self._places.items():
            steps = self._cycle * world.from_main(max(1, round(self._seconds * share / lengths[place])))
            trainer.step = place
            began = _now(world.device)
            yield from self._idle(steps)
            mean, timed = mean + share * (_now(world.device) - began) / steps, timed + steps
        slowest = world.gather(torch.tensor([mean], dtype=torch.float64, device=world.control_device)).max()
        self.found = StepTime(seconds=float(slowest), steps=timed)
        trainer.step = trainer.config.steps

    @staticmethod
    def _idle(steps: int) -> Iterator[None]:
        for _ in range(steps):
            yield


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
