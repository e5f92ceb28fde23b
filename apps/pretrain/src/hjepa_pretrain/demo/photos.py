"""The backgrounds of the demo: real photos that lie in the wheels of packages that this app depends on.

Nothing of them is copied into this repository or downloaded; the licence of each stands beside its name.
"""

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hjepa_pretrain.demo.garments import Split


@dataclass(frozen=True, kw_only=True, slots=True)
class Photo:
    """Where a photo lies and under which licence."""

    package: str
    path: str
    licence: str

    def open(self) -> Image.Image:
        """Decodes the photo to RGB."""
        # The package is found but not imported, which would take longer than composing the pictures.
        spec = find_spec(self.package)
        if spec is None or spec.origin is None:
            raise ValueError(f"package={self.package!r}: not installed; allowed: the app's dependencies; install it")
        with Image.open(Path(spec.origin).parent / self.path) as image:
            return image.convert("RGB")


def _skimage(name: str, licence: str) -> Photo:
    return Photo(package="skimage", path=f"data/{name}", licence=licence)


PHOTOS: dict[Split, tuple[Photo, ...]] = {
    Split.TRAIN: (
        _skimage("astronaut.png", "public domain (NASA)"),
        _skimage("camera.png", "CC0 (Lav Varshney)"),
        _skimage("chelsea.png", "CC0 (Stefan van der Walt)"),
        _skimage("coins.png", "no known copyright restrictions (Brooklyn Museum)"),
        _skimage("grass.png", "CC0 (linolafett)"),
        _skimage("gravel.png", "CC0 (CC0Textures)"),
        _skimage("hubble_deep_field.jpg", "public domain (NASA)"),
        _skimage("ihc.png", "no known copyright restrictions (CMMI)"),
        _skimage("moon.png", "BSD-3-Clause (scikit-image; no other terms stated)"),
        _skimage("retina.jpg", "CC0 (Mikael Häggström)"),
        _skimage("rocket.jpg", "public domain (SpaceX)"),
        Photo(
            package="matplotlib",
            path="mpl-data/sample_data/grace_hopper.jpg",
            licence="public domain (US Navy)",
        ),
    ),
    Split.EVAL: (
        _skimage("brick.png", "CC0 (CC0Textures)"),
        _skimage("clock_motion.png", "public domain (Stefan van der Walt)"),
        _skimage("coffee.png", "CC0 (Rachel Michetti)"),
        Photo(package="sklearn", path="datasets/images/china.jpg", licence="CC BY 2.0 (danielbuechele)"),
        Photo(package="sklearn", path="datasets/images/flower.jpg", licence="CC BY 2.0 (vultilion)"),
    ),
}


@cache
def load_photo(photo: Photo, short_side: int) -> NDArray[np.uint8]:
    """The photo [H, W, 3] with its short side scaled to `short_side` pixels (box filter, so that nothing aliases)."""
    image = _decoded(photo)
    scale = short_side / min(image.size)
    width, height = (max(short_side, round(side * scale)) for side in image.size)
    return np.asarray(image.resize((width, height), Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC))


@cache
def _decoded(photo: Photo) -> Image.Image:
    return photo.open()
