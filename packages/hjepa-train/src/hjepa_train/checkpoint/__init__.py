"""Checkpoints: directories that are complete or do not exist, and that are never unpickled."""

from hjepa_train.checkpoint.saver import Saver
from hjepa_train.checkpoint.store import Checkpoint, CheckpointConfig, CheckpointStore
from hjepa_train.checkpoint.tensors import SavedTensors

__all__ = ["Checkpoint", "CheckpointConfig", "CheckpointStore", "SavedTensors", "Saver"]
