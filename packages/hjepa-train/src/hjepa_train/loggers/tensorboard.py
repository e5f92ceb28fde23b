"""TensorBoard event files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch.utils.tensorboard import SummaryWriter

from hjepa_train.protocols import Callback

if TYPE_CHECKING:
    from hjepa_train.outcome import Outcome
    from hjepa_train.trainer import Trainer


class TensorBoardLog(Callback):
    """Writes each row as scalars on the main rank; a resumed run hides the rows that it repeats.

    Args:
        folder: Where `events.*` lie, e.g. the run directory.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer: SummaryWriter | None = None

    def on_fit_start(self, trainer: Trainer) -> None:
        """Open a new event file."""
        if trainer.world.is_main:
            self._writer = SummaryWriter(str(self.folder), purge_step=trainer.step + 1)

    def on_row(self, trainer: Trainer, row: Mapping[str, float]) -> None:
        """Add the row's scalars."""
        if self._writer is not None:
            for name, value in row.items():
                if name != "step":
                    self._writer.add_scalar(name, value, global_step=int(row["step"]))

    def on_save(self, trainer: Trainer) -> None:
        """Flush with the checkpoint."""
        if self._writer is not None:
            self._writer.flush()

    def on_fit_end(self, trainer: Trainer, outcome: Outcome | None) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
