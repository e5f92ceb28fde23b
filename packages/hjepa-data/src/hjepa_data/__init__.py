"""Webdataset shards, exact-resume streams, transforms and masks for self-supervised learning."""

from hjepa_data.errors import DataError, WorkerError
from hjepa_data.masks import Masks, MultiBlockConfig, MultiBlockMasks
from hjepa_data.shards import RawSample, ShardSource, ShardWriter, expand_shards, write_shards
from hjepa_data.stream import (
    Batch,
    EvalConfig,
    EvalStream,
    StartMethod,
    StreamConfig,
    StreamOrder,
    TrainStream,
    WorkerConfig,
)
from hjepa_data.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ColorAugment,
    ColorConfig,
    Interpolation,
    SkipReason,
    ViewGroup,
    normalize,
)

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Batch",
    "ColorAugment",
    "ColorConfig",
    "DataError",
    "EvalConfig",
    "EvalStream",
    "Interpolation",
    "Masks",
    "MultiBlockConfig",
    "MultiBlockMasks",
    "RawSample",
    "ShardSource",
    "ShardWriter",
    "SkipReason",
    "StartMethod",
    "StreamConfig",
    "StreamOrder",
    "TrainStream",
    "ViewGroup",
    "WorkerConfig",
    "WorkerError",
    "expand_shards",
    "normalize",
    "write_shards",
]
