"""How fast the steps are, without what callbacks and checkpoints take."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(kw_only=True, slots=True, frozen=True)
class Speed:
    """The steps between two readings."""

    seconds: float
    """Wall time of all of them."""
    images_per_second: float
    """Samples of all ranks."""
    step_ms: float
    """Wall time of an optimizer step."""


class Throughput:
    """A clock that stands still while callbacks and checkpoints are at work.

    Attributes:
        waited: Seconds since the last reading in which the loop waited for a batch.
    """

    def __init__(self) -> None:
        self.start(step=0, samples=0)

    def start(self, *, step: int, samples: int) -> None:
        """Begin to count at a step."""
        self._began, self.waited = time.perf_counter(), 0.0
        self._step, self._samples = step, samples

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as waiting for data."""
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time inside out."""
        began = time.perf_counter()
        yield
        self._began += time.perf_counter() - began

    def read(self, *, step: int, samples: int) -> Speed:
        """Return the speed since the last reading and begin again."""
        elapsed = max(1e-9, time.perf_counter() - self._began)
        speed = Speed(
            seconds=elapsed,
            images_per_second=(samples - self._samples) / elapsed,
            step_ms=1000.0 * elapsed / max(1, step - self._step),
        )
        self.start(step=step, samples=samples)
        return speed
