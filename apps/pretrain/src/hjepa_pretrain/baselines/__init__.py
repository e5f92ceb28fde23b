"""Other ways to train the same encoder, to be beaten fairly: same shards, images, augmentation and optimizer."""

from hjepa_pretrain.baselines.base import Baseline, Inputs
from hjepa_pretrain.baselines.config import BaselineConfig, BaselineKind, build_baseline
from hjepa_pretrain.baselines.mae import MAE
from hjepa_pretrain.baselines.supervised import Supervised

__all__ = ["MAE", "Baseline", "BaselineConfig", "BaselineKind", "Inputs", "Supervised", "build_baseline"]
