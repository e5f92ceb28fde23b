"""A progress bar on a terminal, plain lines in a log file."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from hjepa_train.protocols import Callback

if TYPE_CHECKING:
    from hjepa_train.outcome import Outcome
    from hjepa_train.trainer import StepResult, Trainer


class ProgressBar(Callback):
    """Shows step, loss, images/s and time left on the main rank, as of the last logged row.

    Args:
        every_seconds: Time between lines where the output is not a terminal.
        console: Where to write; None means standard error.
    """

    def __init__(self, *, every_seconds: float = 10.0, console: Console | None = None) -> None:
        self.every_seconds = every_seconds
        self.console = Console(stderr=True) if console is None else console
        self._bar: tuple[Progress, TaskID] | None = None
        self._began = self._warm = (0.0, 0)
        self._written = 0.0
        self._facts = ""

    def on_fit_start(self, trainer: Trainer) -> None:
        """Start the clock and the bar."""
        self._began = self._warm = (time.monotonic(), trainer.step)
        self._written = self._began[0]
        if trainer.world.is_main and self.console.is_terminal:
            columns = (TextColumn("step {task.completed}/{task.total}"), BarColumn(), TextColumn("{task.description}"))
            bar = Progress(*columns, console=self.console)
            self._bar = (bar, bar.add_task("", total=trainer.config.steps, completed=trainer.step))
            bar.start()

    def on_row(self, trainer: Trainer, row: Mapping[str, float]) -> None:
        """Take up the newest loss and speed; write a line where there is no bar and it is time."""
        if "train/loss" in row:
            speed = row["train/images_per_second"]
            self._facts = f"loss {row['train/loss']:.4f}  {speed:,.0f} images/s  {self._left(trainer)} left"
        now = time.monotonic()
        last = trainer.step == trainer.config.steps
        if self._bar is None and trainer.world.is_main and (last or now - self._written >= self.every_seconds):
            self._written = now
            line = f"step {trainer.step}/{trainer.config.steps}  {self._facts}"
            self.console.print(line, highlight=False, soft_wrap=True)

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        """Move the bar."""
        if trainer.step == self._began[1] + 1:
            # The first step also starts loaders and compilers: it tells little of those to come.
            self._warm = (time.monotonic(), trainer.step)
        if self._bar is not None:
            bar, task = self._bar
            bar.update(task, completed=trainer.step, description=self._facts)

    def on_fit_end(self, trainer: Trainer, outcome: Outcome | None) -> None:
        """Leave the bar as it is and the terminal in order."""
        if self._bar is not None:
            bar, task = self._bar
            bar.update(task, completed=trainer.step, description=self._facts)
            bar.stop()
            self._bar = None

    def _left(self, trainer: Trainer) -> str:
        began, first = self._warm if trainer.step > self._warm[1] else self._began
        seconds = (time.monotonic() - began) / max(1, trainer.step - first) * (trainer.config.steps - trainer.step)
        return duration(seconds)


def duration(seconds: float) -> str:
    """Write a duration for people.

    >>> duration(75.4), duration(3600.0 * 25)
    ('1:15', '25:00:00')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
