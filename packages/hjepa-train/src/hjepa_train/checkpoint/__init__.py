"""Checkpoints: directories that are complete or do not exist, and that are never unpickled."""

from hjepa_train.checkpoint.store import Checkpoint, CheckpointConfig, CheckpointStore

__all__ = ["Checkpoint", "CheckpointConfig", "CheckpointStore"]
