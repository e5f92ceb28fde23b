"""Where the rows go: JSON lines, TensorBoard, Weights & Biases, MLflow."""

from hjepa_train.loggers.choice import LoggerConfig, LoggerKind, build_loggers
from hjepa_train.loggers.jsonl import MetricsLog
from hjepa_train.loggers.mlflow import MLflowLog
from hjepa_train.loggers.tensorboard import TensorBoardLog
from hjepa_train.loggers.wandb import WandbLog

__all__ = [
    "LoggerConfig",
    "LoggerKind",
    "MLflowLog",
    "MetricsLog",
    "TensorBoardLog",
    "WandbLog",
    "build_loggers",
]
