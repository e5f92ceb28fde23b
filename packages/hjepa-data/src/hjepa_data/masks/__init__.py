"""Masks: which tokens are seen and which are predicted."""

from hjepa_data.masks.base import Masks, MaskSampler
from hjepa_data.masks.block import BlockMaskConfig, BlockMasks
from hjepa_data.masks.budget import MaskConfig
from hjepa_data.masks.config import MultiBlockConfig
from hjepa_data.masks.hierarchical import CellLaw, HierarchicalMaskConfig, HierarchicalMasks
from hjepa_data.masks.multiblock import MultiBlockMasks
from hjepa_data.masks.released import ReleasedMaskConfig, ReleasedMasks
from hjepa_data.masks.scattered import RandomMaskConfig, RandomMasks

__all__ = [
    "MASK_LAWS",
    "BlockMaskConfig",
    "BlockMasks",
    "CellLaw",
    "HierarchicalMaskConfig",
    "HierarchicalMasks",
    "MaskConfig",
    "MaskSampler",
    "Masks",
    "MultiBlockConfig",
    "MultiBlockMasks",
    "RandomMaskConfig",
    "RandomMasks",
    "ReleasedMaskConfig",
    "ReleasedMasks",
]

MASK_LAWS: dict[str, type[MaskConfig]] = {
    "multiblock": MultiBlockConfig,
    "released": ReleasedMaskConfig,
    "block": BlockMaskConfig,
    "random": RandomMaskConfig,
    "hierarchical": HierarchicalMaskConfig,
}
