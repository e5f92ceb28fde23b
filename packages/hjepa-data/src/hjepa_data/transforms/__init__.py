"""Transforms: decode, crop (in the workers), colour and normalisation (on the device)."""

from hjepa_data.transforms.color import IMAGENET_MEAN, IMAGENET_STD, ColorAugment, ColorConfig, normalize
from hjepa_data.transforms.crop import Interpolation, ViewGroup
from hjepa_data.transforms.decode import SkipReason

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "ColorAugment",
    "ColorConfig",
    "Interpolation",
    "SkipReason",
    "ViewGroup",
    "normalize",
]
