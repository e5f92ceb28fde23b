"""What happens around the steps: measuring, monitors, progress, profiles, limits."""

from hjepa_train.callbacks.early_stop import EarlyStop, EarlyStopConfig, StopMode
from hjepa_train.callbacks.measure import Measure
from hjepa_train.callbacks.monitor import CollapseMonitor, CollapsePolicy, MonitorConfig
from hjepa_train.callbacks.profiler import Profiler, ProfilerConfig
from hjepa_train.callbacks.progress import ProgressBar
from hjepa_train.callbacks.save import SaveEvery
from hjepa_train.callbacks.time_limit import TimeLimit

__all__ = [
    "CollapseMonitor",
    "CollapsePolicy",
    "EarlyStop",
    "EarlyStopConfig",
    "Measure",
    "MonitorConfig",
    "Profiler",
    "ProfilerConfig",
    "ProgressBar",
    "SaveEvery",
    "StopMode",
    "TimeLimit",
]
