"""A resumable trainer: DDP/FSDP2, EMA, schedules, atomic checkpoints, collapse monitor."""

from hjepa_train.callbacks import (
    CollapseMonitor,
    CollapsePolicy,
    MetricsLog,
    MonitorConfig,
    Profiler,
    ProfilerConfig,
    ProgressBar,
    TensorBoardLog,
    TimeLimit,
)
from hjepa_train.checkpoint import Checkpoint, CheckpointConfig, CheckpointStore
from hjepa_train.ema import EMA
from hjepa_train.errors import CheckpointError, CollapseError, TrainingError
from hjepa_train.optim import OptimizerConfig, OptimizerKind, parameter_groups
from hjepa_train.outcome import EXIT_DONE, EXIT_ERROR, EXIT_PREEMPTED, EXIT_WRONG_INPUT, Outcome
from hjepa_train.parallel import ParallelConfig, ParallelKind, World, init_world, leave_world
from hjepa_train.precision import Precision
from hjepa_train.protocols import Batch, Callback, HasEMA, Output, StepOutput, Stream
from hjepa_train.schedules import ScheduleConfig, ScheduleKind
from hjepa_train.trainer import StepResult, Trainer, TrainerConfig

__all__ = [
    "EMA",
    "EXIT_DONE",
    "EXIT_ERROR",
    "EXIT_PREEMPTED",
    "EXIT_WRONG_INPUT",
    "Batch",
    "Callback",
    "Checkpoint",
    "CheckpointConfig",
    "CheckpointError",
    "CheckpointStore",
    "CollapseError",
    "CollapseMonitor",
    "CollapsePolicy",
    "HasEMA",
    "MetricsLog",
    "MonitorConfig",
    "OptimizerConfig",
    "OptimizerKind",
    "Outcome",
    "Output",
    "ParallelConfig",
    "ParallelKind",
    "Precision",
    "Profiler",
    "ProfilerConfig",
    "ProgressBar",
    "ScheduleConfig",
    "ScheduleKind",
    "StepOutput",
    "StepResult",
    "Stream",
    "TensorBoardLog",
    "TimeLimit",
    "Trainer",
    "TrainerConfig",
    "TrainingError",
    "World",
    "init_world",
    "leave_world",
    "parameter_groups",
]
