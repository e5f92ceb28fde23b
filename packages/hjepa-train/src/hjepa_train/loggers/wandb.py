"""Weights & Biases: rows as the history of a run, on its servers or in a local folder (`WANDB_MODE=offline`)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hjepa_train.errors import one_line
from hjepa_train.extra import load, require
from hjepa_train.protocols import Callback

if TYPE_CHECKING:
    from hjepa_train.outcome import Outcome
    from hjepa_train.trainer import Trainer

logger = logging.getLogger(__name__)


class WandbLog(Callback):
    """Writes each row on the main rank; a resumed run goes on in the run that its checkpoint names.

    Rows that a resumed run repeats are dropped by W&B, whose history only grows. What is set by `WANDB_*` variables
    (mode, entity, key) is left to them.

    Args:
        folder: Where `wandb/` lies, e.g. the run directory.
        project: Of W&B.
        name: Of the run; None lets W&B choose.
        settings: What to keep as the run's configuration.

    Raises:
        ValueError: Where the extra `wandb` is not installed.
    """

    def __init__(
        self, folder: Path, *, project: str, name: str | None = None, settings: Mapping[str, Any] | None = None
    ) -> None:
        require("wandb", "loggers=wandb", "hjepa-train[wandb]")
        self.folder, self.project, self.name = folder, project, name
        self.settings = {} if settings is None else dict(settings)
        self._id: str | None = None
        self._run: Any = None

    def on_fit_start(self, trainer: Trainer) -> None:
        """Open the run."""
        if not trainer.world.is_main:
            return
        wandb = load("wandb", "loggers=wandb", "hjepa-train[wandb]")
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._run = wandb.init(
                dir=str(self.folder),
                project=self.project,
                name=self.name,
                id=self._id,
                config=self.settings,
                resume="allow",
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.Error as error:
            raise ValueError(
                f"loggers=wandb: {one_line(error).rstrip('.')}; mend that, set WANDB_MODE=offline, or leave wandb out"
            ) from error
        self._id = str(self._run.id)

    def on_row(self, trainer: Trainer, row: Mapping[str, float]) -> None:
        """Add the row to the history."""
        if self._run is not None:
            self._run.log({name: value for name, value in row.items() if name != "step"}, step=int(row["step"]))

    def on_fit_end(self, trainer: Trainer, outcome: Outcome | None) -> None:
        """Close the run, as failed where an error ended it."""
        if self._run is not None:
            self._run.finish(exit_code=1 if outcome is None else 0)
            self._run = None

    def state_dict(self) -> dict[str, Any]:
        """Return the id of the run; other ranks than the main one have none."""
        return {} if self._id is None else {"id": self._id}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with a run."""
        self._id = state["id"]
