"""The garments of the demo: 4,800 pictures of Fashion-MNIST from the sheet that ships with this package."""

from enum import StrEnum
from functools import cache
from importlib import resources
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

CLASS_NAMES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
SIDE = 28
COLUMNS = 80
ROWS_PER_CLASS = 6
# The last row of a class comes from the published test set; see tools/make_demo_asset.py, which writes this layout.
TRAIN_ROWS = 5

_Pixel = TypeVar("_Pixel", bound=np.generic)


class Split(StrEnum):
    """Training and held-out pictures: they share neither a garment nor a photo."""

    TRAIN = "train"
    EVAL = "eval"


@cache
def load_garments(split: Split) -> tuple[NDArray[np.uint8], NDArray[np.bool_], NDArray[np.int64]]:
    """Reads one split of the garments.

    Args:
        split: which garments; the two splits are disjoint.

    Returns:
        Grey values [G, 28, 28], silhouettes [G, 28, 28] (True = garment) and class labels [G], the classes in order
        and of equal size.
    """
    folder = resources.files(__package__) / "assets"
    with (folder / "garments.webp").open("rb") as file:
        grey = np.asarray(Image.open(file).convert("L"))
    with (folder / "garments_alpha.png").open("rb") as file:
        alpha = np.asarray(Image.open(file).convert("1"))
    rows = slice(0, TRAIN_ROWS) if split is Split.TRAIN else slice(TRAIN_ROWS, ROWS_PER_CLASS)
    values, silhouettes = _tiles(grey)[:, rows], _tiles(alpha)[:, rows]
    labels = np.repeat(np.arange(len(CLASS_NAMES)), values.shape[1] * COLUMNS)
    return values.reshape(-1, SIDE, SIDE), silhouettes.reshape(-1, SIDE, SIDE), labels


def _tiles(sheet: NDArray[_Pixel]) -> NDArray[_Pixel]:
    """Cuts the sheet into [class, row, column, 28, 28]."""
    tiles = sheet.reshape(len(CLASS_NAMES), ROWS_PER_CLASS, SIDE, COLUMNS, SIDE)
    return tiles.transpose(0, 1, 3, 2, 4)
