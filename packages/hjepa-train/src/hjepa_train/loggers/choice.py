"""Which loggers a run has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from hjepa_train.errors import choice
from hjepa_train.loggers.jsonl import MetricsLog
from hjepa_train.loggers.mlflow import MLflowLog
from hjepa_train.loggers.tensorboard import TensorBoardLog
from hjepa_train.loggers.wandb import WandbLog
from hjepa_train.protocols import Callback


class LoggerKind(StrEnum):
    """Where the rows go."""

    tensorboard = "tensorboard"
    jsonl = "jsonl"
    wandb = "wandb"
    mlflow = "mlflow"


@dataclass(kw_only=True, slots=True)
class LoggerConfig:
    """Names that the loggers of other services take."""

    project: str = "hjepa"
    """Project of W&B and experiment of MLflow."""
    name: str | None = None
    """Of the run there; null means the name of its folder."""
    mlflow_uri: str | None = None
    """Where MLflow keeps runs, e.g. sqlite:///mlflow.db; null means MLFLOW_TRACKING_URI or MLflow's own default."""


def build_loggers(
    kinds: tuple[LoggerKind, ...],
    folder: Path,
    config: LoggerConfig | None = None,
    settings: Mapping[str, Any] | None = None,
) -> list[Callback]:
    """Return the loggers of a run in the order in which they are named.

    Args:
        kinds: Which.
        folder: Of the run.
        config: Names for other services.
        settings: Flat; what W&B and MLflow keep as the run's configuration.

    Raises:
        ValueError: Where a package is missing, with the extra that has it.
    """
    config = LoggerConfig() if config is None else config
    name = folder.name if config.name is None else config.name
    made: dict[LoggerKind, Callback] = {}
    for kind in (choice(LoggerKind, "loggers", one) for one in kinds):
        if kind is LoggerKind.jsonl:
            made[kind] = MetricsLog(folder / "metrics.jsonl")
        elif kind is LoggerKind.tensorboard:
            made[kind] = TensorBoardLog(folder)
        elif kind is LoggerKind.wandb:
            made[kind] = WandbLog(folder, project=config.project, name=name, settings=settings)
        else:
            made[kind] = MLflowLog(config.mlflow_uri, experiment=config.project, name=name, settings=settings)
    return list(made.values())
