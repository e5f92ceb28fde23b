"""Masks: which tokens are seen and which are predicted."""

from hjepa_data.masks.config import MultiBlockConfig
from hjepa_data.masks.multiblock import Masks, MultiBlockMasks

__all__ = ["Masks", "MultiBlockConfig", "MultiBlockMasks"]
