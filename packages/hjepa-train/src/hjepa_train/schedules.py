"""Schedules are pure functions of the step, so that nothing is replayed to resume."""

from __future__ import annotations

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
    return np.clip((np.asarray(step, np.float64) - start) / max(1, end - start), 0.0, 1.0)


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


def warmup(step: Steps, *, start_value: float, value: float, steps: int) -> Values:
    """Rise from `start_value` to `value`: step s has gone (s + 1) / (steps + 1) of the way.

    The first step has already left `start_value` (a learning rate of 0 would waste it) and step `steps` is at
    `value`, where the decay begins.

    >>> warmup(np.arange(5), start_value=0.0, value=1.0, steps=3).tolist()
    [0.25, 0.5, 0.75, 1.0, 1.0]
    """
    return linear(np.asarray(step) + 1, value=start_value, final=value, start=0, end=steps + 1)


@dataclass(kw_only=True, slots=True)
class ScheduleConfig:
    """A value over the steps of a run: a linear warm-up, then a constant, a line or half a cosine."""

    kind: ScheduleKind = ScheduleKind.constant
    """`constant`, `linear` or `cosine`, after the warm-up."""
    value: float = 0.0
    """The value at the end of the warm-up, in the unit of what is scheduled."""
    final: float | None = None
    """The value at the end of the schedule; `linear` and `cosine` need it, `constant` has none."""
    warmup_steps: int = 0
    """Optimizer steps of the warm-up; 0 means none."""
    warmup_start: float = 0.0
    """The value from which the warm-up rises."""
    steps: int | None = None
    """Optimizer steps at which `final` is reached; None means the steps of the run."""

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        self.kind = choice(ScheduleKind, "kind", self.kind)
        if self.kind is not ScheduleKind.constant and self.final is None:
            raise ValueError(f"final=None: kind={self.kind.value} ends at a value; give final, or kind=constant")
        if self.kind is ScheduleKind.constant and self.final not in (None, self.value):
            raise ValueError(f"final={self.final}: kind=constant stays at value={self.value}; use linear or cosine")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps={self.warmup_steps}: negative; allowed: 0 (no warm-up) and more")
        if self.steps is not None and self.steps <= self.warmup_steps:
            raise ValueError(
                f"steps={self.steps}: not more than warmup_steps={self.warmup_steps}; give more, or warm up faster"
            )

    def build(self, steps: int) -> Callable[[int], float]:
        """Return the schedule of a run of `steps` optimizer steps as a function of the steps done.

        >>> at = ScheduleConfig(kind=ScheduleKind.linear, value=0.5, final=1.0).build(steps=4)
        >>> [at(step) for step in range(5)]
        [0.5, 0.625, 0.75, 0.875, 1.0]
        """
        return lambda step: float(self.values(step, steps))

    def values(self, step: Steps, steps: int) -> Values:
        """Return the values at `step` (any shape) in a run of `steps` optimizer steps.

        >>> config = ScheduleConfig(kind=ScheduleKind.cosine, value=1.0, final=0.0, warmup_steps=1)
        >>> config.values(np.arange(5), steps=5).round(3).tolist()
        [0.5, 1.0, 0.854, 0.5, 0.146]
        """
        rising = warmup(step, start_value=self.warmup_start, value=self.value, steps=self.warmup_steps)
        if self.kind is ScheduleKind.constant or self.final is None:
            falling = np.full_like(rising, self.value)
        else:
            way = cosine if self.kind is ScheduleKind.cosine else linear
            end = steps if self.steps is None else self.steps
            falling = way(step, value=self.value, final=self.final, start=self.warmup_steps, end=end)
        return np.where(np.asarray(step) < self.warmup_steps, rising, falling)
