"""Schedules are pure functions of the step, so that nothing is replayed to resume."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from hjepa_train.errors import choice

Steps: TypeAlias = int | npt.NDArray[np.int64]
Values: TypeAlias = npt.NDArray[np.float64]


class ScheduleKind(StrEnum):
    """How a value goes from `value` to `final`."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"
    exponential = "exponential"


class ScheduleUnit(StrEnum):
    """What a schedule counts."""

    steps = "steps"
    samples = "samples"
    epochs = "epochs"


def progress(step: Steps, *, start: int, end: int) -> Values:
    """Return the share of the way from `start` to `end` steps, between 0 and 1.

    Args:
        step: Steps done, of any shape.
        start: Step at which the way begins.
        end: Step at which it ends; an empty way is at its end.

    Returns:
        min(1, max(0, (step - start) / (end - start))), in the shape of `step`.

    >>> progress(np.arange(6), start=1, end=5).tolist()
    [0.0, 0.0, 0.25, 0.5, 0.75, 1.0]
    """
    done = np.asarray(step, np.float64)
    return np.where(done >= end, 1.0, np.clip((done - start) / max(1, end - start), 0.0, 1.0))


def linear(step: Steps, *, value: float, final: float, start: int, end: int) -> Values:
    """Go from `value` to `final` in a straight line.

    >>> linear(np.arange(0, 9, 2), value=1.0, final=0.0, start=0, end=8).tolist()
    [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    share = progress(step, start=start, end=end)
    return (1.0 - share) * value + share * final


def cosine(step: Steps, *, value: float, final: float, start: int, end: int) -> Values:
    """Go from `value` to `final` along half a cosine: final + (value - final) (1 + cos(pi p)) / 2.

    Source: SGDR, arXiv 1608.03983, equation 5, without restarts.

    >>> cosine(np.arange(0, 9, 4), value=1.0, final=0.0, start=0, end=8).round(3).tolist()
    [1.0, 0.5, 0.0]
    """
    share = 0.5 * (1.0 - np.cos(np.pi * progress(step, start=start, end=end)))
    return (1.0 - share) * value + share * final


def exponential(step: Steps, *, value: float, final: float, start: int, end: int) -> Values:
    """Go from `value` to `final` by equal factors: value (final / value)^p; both are above 0.

    >>> exponential(np.arange(0, 9, 4), value=1e-4, final=1.0, start=0, end=8).tolist()
    [0.0001, 0.01, 1.0]
    """
    share = progress(step, start=start, end=end)
    return np.float64(value) * np.float64(final / value) ** share


def horizon_momentum(horizon: float, steps: int) -> float:
    """Return the momentum of an average that looks back over a share of the run: 1 - 1 / max(1, horizon * steps).

    The average of momentum m is about 1 / (1 - m) steps old. The same momentum is a short memory in a long run and a
    long one in a short run: 0.996 looks back over 1/750 of the 187,500 steps for which it was made (I-JEPA, arXiv
    2301.08243, appendix A: 300 epochs of ImageNet in batches of 2,048), and over 14 % of a run of 1,800 steps.

    Args:
        horizon: Share of the run, above 0.
        steps: Optimizer steps of the run.

    >>> round(horizon_momentum(1 / 36, 1_800), 6), round(horizon_momentum(1 / 750, 187_500), 6)
    (0.98, 0.996)
    """
    return 1.0 - 1.0 / max(1.0, horizon * steps)


def warmup(step: Steps, *, start_value: float, value: float, steps: int) -> Values:
    """Rise from `start_value` to `value`: step s has gone (s + 1) / (steps + 1) of the way.

    The first step has already left `start_value` (a learning rate of 0 would waste it) and step `steps` is at
    `value`, where the decay begins.

    >>> warmup(np.arange(5), start_value=0.0, value=1.0, steps=3).tolist()
    [0.25, 0.5, 0.75, 1.0, 1.0]
    """
    return linear(np.asarray(step) + 1, value=start_value, final=value, start=0, end=steps + 1)


_WAYS = {ScheduleKind.linear: linear, ScheduleKind.cosine: cosine, ScheduleKind.exponential: exponential}


@dataclass(kw_only=True, slots=True, frozen=True)
class RunLength:
    """How long a run is, in every unit that a schedule may count."""

    steps: int
    """Optimizer steps of the run."""
    samples_per_step: int | None = None
    """Samples of an optimizer step over all ranks and micro-batches; None means unknown."""
    samples_per_epoch: int | None = None
    """Samples of the training set; None means unknown."""

    def to_steps(self, count: int, unit: ScheduleUnit) -> int:
        """Return the optimizer steps in which `count` samples or epochs are seen, rounded up.

        >>> RunLength(steps=100, samples_per_step=64, samples_per_epoch=1000).to_steps(2, ScheduleUnit.epochs)
        32
        """
        if unit is ScheduleUnit.steps:
            return count
        size, epoch = self.samples_per_step, self.samples_per_epoch
        if size is None or (unit is ScheduleUnit.epochs and epoch is None):
            field = "samples_per_step" if size is None else "samples_per_epoch"
            raise ValueError(f"unit={unit.value}: the trainer does not know {field}; set it, or use unit=steps")
        samples = count if epoch is None or unit is ScheduleUnit.samples else count * epoch
        return -(-samples // size)


@dataclass(kw_only=True, slots=True)
class ScheduleConfig:
    """A value over the steps of a run: a linear warm-up, then a constant, a line, half a cosine or equal factors."""

    kind: ScheduleKind = ScheduleKind.constant
    """`constant`, `linear`, `cosine` or `exponential`, after the warm-up."""
    value: float = 0.0
    """The value at the end of the warm-up, in the unit of what is scheduled."""
    horizon: float | None = None
    """In place of `value`, for a momentum: share of the run that the average looks back; `horizon_momentum`."""
    final: float | None = None
    """The value at the end of the schedule; all kinds but `constant` need it."""
    warmup_steps: int = 0
    """Length of the warm-up, counted in `unit`; 0 means none."""
    warmup_start: float = 0.0
    """The value from which the warm-up rises."""
    steps: int | None = None
    """Length after which `final` is reached, counted in `unit`; None means the whole run."""
    unit: ScheduleUnit = ScheduleUnit.steps
    """What `warmup_steps` and `steps` count: optimizer `steps`, `samples` of all ranks, or `epochs`."""

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        self.kind = choice(ScheduleKind, "kind", self.kind)
        self.unit = choice(ScheduleUnit, "unit", self.unit)
        for name in ("value", "final", "warmup_start"):
            number = getattr(self, name)
            if number is not None and not math.isfinite(number):
                raise ValueError(f"{name}={number}: not finite; allowed: any finite number")
        if self.kind is not ScheduleKind.constant and self.final is None:
            raise ValueError(f"final=None: kind={self.kind.value} ends at a value; give final, or kind=constant")
        if self.kind is ScheduleKind.constant and self.final not in (None, self.value):
            stays = f"value={self.value}" if self.horizon is None else f"horizon={self.horizon}"
            raise ValueError(
                f"final={self.final}: kind=constant stays at {stays}; give final=null, or use linear or cosine"
            )
        if self.kind is ScheduleKind.exponential and (self.value <= 0.0 or (self.final or 0.0) <= 0.0):
            raise ValueError(
                f"value={self.value}, final={self.final}: kind=exponential goes by factors; allowed: both above 0"
            )
        if self.horizon is not None and not 0.0 < self.horizon <= 1.0:
            raise ValueError(f"horizon={self.horizon}: no share of a run; allowed: above 0 up to 1, or null for value")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps={self.warmup_steps}: negative; allowed: 0 (no warm-up) and more")
        if self.steps is not None and self.steps <= self.warmup_steps:
            raise ValueError(
                f"steps={self.steps}: not more than warmup_steps={self.warmup_steps}; give more, or warm up faster"
            )

    def check_range(self, name: str, *, most: float = math.inf) -> None:
        """Raise a ValueError, under the name of what is scheduled, where a value leaves 0 to `most`."""
        for field in ("value", "final", "warmup_start"):
            number = getattr(self, field)
            if number is not None and not 0.0 <= number <= most:
                allowed = "0 and more" if most == math.inf else f"0 to {most:g}"
                raise ValueError(f"{name}.{field}={number}: out of range; allowed: {allowed}")

    def build(self, length: RunLength | int) -> Callable[[int], float]:
        """Return the schedule of a run of a length (or of so many steps) as a function of the steps done.

        >>> at = ScheduleConfig(kind=ScheduleKind.linear, value=0.5, final=1.0).build(4)
        >>> [at(step) for step in range(5)]
        [0.5, 0.625, 0.75, 0.875, 1.0]
        """
        return lambda step: float(self.values(step, length))

    def values(self, step: Steps, length: RunLength | int) -> Values:
        """Return the values at `step` (any shape) in a run of a length (or of so many optimizer steps).

        >>> config = ScheduleConfig(kind=ScheduleKind.cosine, value=1.0, final=0.0, warmup_steps=1)
        >>> config.values(np.arange(5), 5).round(3).tolist()
        [0.5, 1.0, 0.854, 0.5, 0.146]
        """
        length = RunLength(steps=length) if isinstance(length, int) else length
        value = self.value if self.horizon is None else horizon_momentum(self.horizon, length.steps)
        first = length.to_steps(self.warmup_steps, self.unit)
        end = length.steps if self.steps is None else length.to_steps(self.steps, self.unit)
        rising = warmup(step, start_value=self.warmup_start, value=value, steps=first)
        if self.kind is ScheduleKind.constant or self.final is None:
            falling = np.full_like(rising, value)
        else:
            falling = _WAYS[self.kind](step, value=value, final=self.final, start=first, end=end)
        return np.where(np.asarray(step) < first, rising, falling)
