"""`metrics.jsonl`: one row a step that is logged, readable while the run goes on."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING

from hjepa_train.checkpoint.files import replace_text
from hjepa_train.protocols import Callback

if TYPE_CHECKING:
    from hjepa_train.outcome import Outcome
    from hjepa_train.trainer import Trainer


class MetricsLog(Callback):
    """Writes rows as JSON lines on the main rank; floats keep every bit, what is not finite is `null`.

    On resume the rows after the checkpoint's step go, so that each step stands once and the file reads like that
    of a run that was never interrupted.

    Args:
        path: The file, e.g. `run/metrics.jsonl`; its folder is made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[str] | None = None

    def on_fit_start(self, trainer: Trainer) -> None:
        """Open the file at the step that the run goes on from."""
        if trainer.world.is_main:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            keep_rows(self.path, last_step=trainer.step)
            self._file = self.path.open("a", encoding="utf-8")

    def on_row(self, trainer: Trainer, row: Mapping[str, float]) -> None:
        """Append a row; a reader sees it at once."""
        if self._file is not None:
            content = {name: value if math.isfinite(value) else None for name, value in row.items()}
            self._file.write(json.dumps(content, allow_nan=False) + "\n")
            self._file.flush()

    def on_save(self, trainer: Trainer) -> None:
        """Wait until the rows before the checkpoint are on the disk too."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def on_fit_end(self, trainer: Trainer, outcome: Outcome | None) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def keep_rows(path: Path, *, last_step: int) -> None:
    """Drop the rows after a step, and a last line that a crash has torn, from a JSON-lines file."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if _step(line) <= last_step]
    if len(kept) < len(lines):
        replace_text(path, "".join(kept))


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"]) if line.endswith("\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf
