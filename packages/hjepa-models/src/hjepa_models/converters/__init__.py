"""Weights from and to other projects; every load is strict, what is left out is named."""

from hjepa_models.converters.ijepa import encoder_from_ijepa, from_ijepa
from hjepa_models.converters.timm import from_timm, to_timm
from hjepa_models.converters.vjepa2 import encoder_from_vjepa2, from_vjepa2

__all__ = ["encoder_from_ijepa", "encoder_from_vjepa2", "from_ijepa", "from_timm", "from_vjepa2", "to_timm"]
