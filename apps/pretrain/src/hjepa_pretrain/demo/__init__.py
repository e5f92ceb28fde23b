"""The embedded demo data: garments composited onto crops of real photos. They are composites, and are called so."""

from hjepa_pretrain.demo.compose import DemoSet, compose_demo
from hjepa_pretrain.demo.garments import CLASS_NAMES, Split
from hjepa_pretrain.demo.photos import PHOTOS, Photo

__all__ = ["CLASS_NAMES", "PHOTOS", "DemoSet", "Photo", "Split", "compose_demo"]
