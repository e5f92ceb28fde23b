"""A resumable trainer: DDP/FSDP2, EMA, schedules, atomic checkpoints, collapse monitor."""

from hjepa_train.callbacks import (
    CollapseMonitor,
    CollapsePolicy,
    EarlyStop,
    EarlyStopConfig,
    Measure,
    MonitorConfig,
    Profiler,
    ProfilerConfig,
    ProgressBar,
    StopMode,
    TimeLimit,
)
from hjepa_train.checkpoint import Checkpoint, CheckpointConfig, CheckpointStore
from hjepa_train.config import TrainerConfig
from hjepa_train.ema import EMA
from hjepa_train.errors import CheckpointError, CollapseError, DivergedError, TrainingError, UnstableError
from hjepa_train.guard import GuardConfig
from hjepa_train.loggers import (
    LoggerConfig,
    LoggerKind,
    MetricsLog,
    MLflowLog,
    TensorBoardLog,
    WandbLog,
    build_loggers,
)
from hjepa_train.lr_finder import RateSweep, find_rate
from hjepa_train.optim import OptimizerConfig, OptimizerKind, parameter_groups
from hjepa_train.outcome import EXIT_DONE, EXIT_ERROR, EXIT_PREEMPTED, EXIT_UNSTABLE, EXIT_WRONG_INPUT, Outcome
from hjepa_train.parallel import FSDPConfig, ParallelConfig, ParallelKind, World, init_world, leave_world
from hjepa_train.precision import Precision
from hjepa_train.protocols import (
    Batch,
    Callback,
    Compilable,
    Cyclic,
    HasEMA,
    Output,
    SkipsParameters,
    StepOutput,
    Stream,
)
from hjepa_train.schedules import RunLength, ScheduleConfig, ScheduleKind, ScheduleUnit
from hjepa_train.step_time import StepTime, time_steps
from hjepa_train.trainer import StepResult, Trainer

__all__ = [
    "EMA",
    "EXIT_DONE",
    "EXIT_ERROR",
    "EXIT_PREEMPTED",
    "EXIT_UNSTABLE",
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
    "Compilable",
    "Cyclic",
    "DivergedError",
    "EarlyStop",
    "EarlyStopConfig",
    "FSDPConfig",
    "GuardConfig",
    "HasEMA",
    "LoggerConfig",
    "LoggerKind",
    "MLflowLog",
    "Measure",
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
    "RateSweep",
    "RunLength",
    "ScheduleConfig",
    "ScheduleKind",
    "ScheduleUnit",
    "SkipsParameters",
    "StepOutput",
    "StepResult",
    "StepTime",
    "StopMode",
    "Stream",
    "TensorBoardLog",
    "TimeLimit",
    "Trainer",
    "TrainerConfig",
    "TrainingError",
    "UnstableError",
    "WandbLog",
    "World",
    "build_loggers",
    "find_rate",
    "init_world",
    "leave_world",
    "parameter_groups",
    "time_steps",
]
