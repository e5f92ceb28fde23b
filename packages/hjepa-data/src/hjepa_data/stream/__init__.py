"""Streams: the order of samples, batches, training and evaluation."""

from hjepa_data.stream.batch import Batch
from hjepa_data.stream.device import DevicePrefetcher
from hjepa_data.stream.evaluate import EvalConfig, EvalStream
from hjepa_data.stream.gpu_decode import Decode
from hjepa_data.stream.loader import StartMethod, WorkerConfig
from hjepa_data.stream.order import StreamOrder, permutation
from hjepa_data.stream.train import StreamConfig, TrainStream
from hjepa_data.stream.worker import UnreadablePolicy

__all__ = [
    "Batch",
    "Decode",
    "DevicePrefetcher",
    "EvalConfig",
    "EvalStream",
    "StartMethod",
    "StreamConfig",
    "StreamOrder",
    "TrainStream",
    "UnreadablePolicy",
    "WorkerConfig",
    "permutation",
]
