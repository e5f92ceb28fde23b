"""What happens around the steps: logging, progress, monitors, profiles, limits."""

from hjepa_train.callbacks.metrics import MetricsLog
from hjepa_train.callbacks.monitor import CollapseMonitor, CollapsePolicy, MonitorConfig
from hjepa_train.callbacks.profiler import Profiler, ProfilerConfig
from hjepa_train.callbacks.progress import ProgressBar
from hjepa_train.callbacks.save import SaveEvery
from hjepa_train.callbacks.tensorboard import TensorBoardLog
from hjepa_train.callbacks.time_limit import TimeLimit

__all__ = [
    "CollapseMonitor",
    "CollapsePolicy",
    "MetricsLog",
    "MonitorConfig",
    "Profiler",
    "ProfilerConfig",
    "ProgressBar",
    "SaveEvery",
    "TensorBoardLog",
    "TimeLimit",
]
