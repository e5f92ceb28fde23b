"""Random-resized crops with flips, and the centre crop of evaluation, from encoded bytes to uint8 pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from PIL import Image
from torch.nn import functional

from hjepa_data.errors import choice, refuse
from hjepa_data.random import Draws
from hjepa_data.transforms.decode import SkipImageError, SkipReason, Upright

__all__ = [
    "NUMBERS_PER_CROP",
    "CropPlan",
    "Crops",
    "Interpolation",
    "Pixels",
    "ViewGroup",
    "center_crop",
    "crop_numbers",
    "crop_plans",
    "cut_views",
    "resized_crop_box",
]

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Crops = np.ndarray[Any, np.dtype[np.float32]]
Box = tuple[float, float, float, float]

NUMBERS_PER_CROP = 5
_TRIES = 10
_REDUCING_GAP = 2.0


class Interpolation(StrEnum):
    """How a crop is resized; both are antialiased."""

    BILINEAR = "bilinear"
    BICUBIC = "bicubic"


_RESAMPLING = {
    Interpolation.BILINEAR: Image.Resampling.BILINEAR,
    Interpolation.BICUBIC: Image.Resampling.BICUBIC,
}


def size_of(value: tuple[int, ...]) -> tuple[int, ...]:
    """Check a size (height, width)."""
    size = tuple(int(side) for side in value)
    if len(size) != 2 or min(size) < 1:
        refuse("size", size, "a crop has a height and a width", "allowed: two positive integers, such as (224, 224)")
    return size


@dataclass(kw_only=True, slots=True)
class ViewGroup:
    """Views of one size that are cut out of each image.

    Attributes:
        count: number of views.
        size: height and width of a view, pixels.
        scale: smallest and largest area of a crop as a part of the image's area.
        ratio: smallest and largest aspect, width / height, of a crop; drawn log-uniformly.
        flip: probability of a mirror image.
        interpolation: bilinear or bicubic.
    """

    count: int = 1
    size: tuple[int, ...] = (224, 224)
    scale: tuple[float, ...] = (0.3, 1.0)
    ratio: tuple[float, ...] = (3 / 4, 4 / 3)
    flip: float = 0.5
    interpolation: Interpolation = Interpolation.BILINEAR

    def __post_init__(self) -> None:
        if self.count < 1:
            refuse("count", self.count, "a group has at least one view", "allowed: 1 and more")
        self.size = size_of(self.size)
        self.scale = tuple(self.scale)
        self.ratio = tuple(self.ratio)
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1] <= 1:
            refuse("scale", self.scale, "no range of areas", "allowed: 0 < smallest <= largest <= 1")
        if len(self.ratio) != 2 or not 0 < self.ratio[0] <= self.ratio[1] < math.inf:
            refuse("ratio", self.ratio, "no range of aspects", "allowed: 0 < smallest <= largest")
        if not 0 <= self.flip <= 1:
            refuse("flip", self.flip, "no probability", "allowed: 0 to 1")
        self.interpolation = choice(Interpolation, "interpolation", self.interpolation, "no such interpolation")


def resized_crop_box(
    draws: Draws, width: int, height: int, scale: tuple[float, ...], ratio: tuple[float, ...]
) -> tuple[int, int, int, int]:
    """Draw the box of a random-resized crop.

    Area uniform in ``scale``, aspect log-uniform in ``ratio``, position uniform; after ten boxes that do not fit, the
    largest centred box whose aspect is allowed.

    Args:
        draws: random numbers of this view.
        width: of the image, pixels.
        height: of the image, pixels.
        scale: range of the box's part of the area.
        ratio: range of its width / height.

    Returns:
        left, top, width, height of the box, pixels.

    Source: Szegedy et al., "Going deeper with convolutions" (2014), section 6.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(_TRIES):
        area = width * height * draws.uniform(scale[0], scale[1])
        aspect = math.exp(draws.uniform(low, high))
        box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            return draws.below(width - box_width + 1), draws.below(height - box_height + 1), box_width, box_height
    box_width = min(width, max(1, round(height * ratio[1])))
    box_height = min(height, max(1, round(width / ratio[0])))
    return (width - box_width) // 2, (height - box_height) // 2, box_width, box_height


CropPlan = tuple[ViewGroup, tuple[int, int, int, int], bool]


def crop_plans(upright: Upright, groups: tuple[ViewGroup, ...], draws_key: tuple[int, ...]) -> list[CropPlan]:
    """Draw the crops of one image.

    Args:
        upright: the image.
        groups: what views.
        draws_key: (seed, epoch, sample): view v draws from (seed, epoch, sample, v).

    Returns:
        For each view its group, its box (left, top, width, height; pixels of the upright image at full scale) and
        whether it is mirrored.
    """
    plans: list[CropPlan] = []
    for group in groups:
        for _ in range(group.count):
            draws = Draws(*draws_key, len(plans))
            box = resized_crop_box(draws, upright.width, upright.height, group.scale, group.ratio)
            plans.append((group, box, draws.uniform() < group.flip))
    return plans


def crop_numbers(upright: Upright, plans: list[CropPlan]) -> Float32[np.ndarray, "V 5"]:
    """Say where crops lie, whatever the size of the image.

    Args:
        upright: the image.
        plans: of ``crop_plans``.

    Returns:
        For each view left, top, width and height as parts of the upright image's width (left, width) and height (top,
        height), and 1 if it is mirrored, else 0.
    """
    across, down = upright.width, upright.height
    return np.array(
        [
            (left / across, top / down, width / across, height / down, flip)
            for _, (left, top, width, height), flip in plans
        ],
        dtype=np.float32,
    )


def cut_views(upright: Upright, plans: list[CropPlan], out: list[Pixels], row: int) -> None:
    """Cut the views of one image; it is decoded once for all of them.

    Args:
        upright: the image.
        plans: of ``crop_plans``.
        out: for each view, an array [B, 3, H, W].
        row: which image of ``out`` is written.

    Raises:
        SkipImageError: the file is damaged.
    """
    scale = upright.scale(min(min(box[2] / group.size[1], box[3] / group.size[0]) for group, box, _ in plans))
    columns = [_scaled(box[0], box[2], upright.width, scale) for _, box, _ in plans]
    rows = [_scaled(box[1], box[3], upright.height, scale) for _, box, _ in plans]
    image = upright.pixels(scale, max(span.stop for span in rows))
    for view, (group, _, flip) in enumerate(plans):
        pixels = _resized(image[rows[view], columns[view]], group)
        # Grey images are broadcast to three equal channels.
        out[view][row] = pixels[:, :, ::-1] if flip else pixels


def _resized(crop: Pixels, group: ViewGroup) -> Pixels:
    """Resize [H, W, 3] or grey [H, W] to [3, h, w] or [1, h, w]; torch takes a fifth of the time of Pillow for it."""
    # With the batch dimension first its stride tells torch that colours lie side by side: it has a faster way then.
    pixels = torch.from_numpy(np.ascontiguousarray(crop if crop.ndim == 3 else crop[:, :, None]))[None]
    resized = functional.interpolate(
        pixels.permute(0, 3, 1, 2), group.size, mode=str(group.interpolation), antialias=True
    )
    return resized[0].numpy()


def _scaled(start: int, length: int, side: int, scale: int) -> slice:
    """Carry an interval of a side over to an image that is decoded so many times smaller, to whole pixels."""
    small = -(-side // scale)
    first = min(round(start * small / side), small - 1)
    return slice(first, max(first + 1, min(round((start + length) * small / side), small)))


def center_crop(
    upright: Upright, size: tuple[int, ...], crop_fraction: float, interpolation: Interpolation, out: Pixels
) -> None:
    """Cut the centre crop of evaluation: the largest centred box of the right aspect, times ``crop_fraction``.

    Args:
        upright: the image.
        size: height and width of the result, pixels.
        crop_fraction: part of the box's sides that is kept (224 / 256 is usual, 1 keeps all).
        interpolation: bilinear or bicubic.
        out: where the pixels go, [3, H, W].

    Raises:
        SkipImageError: the file is damaged.
    """
    scale = min(upright.width / size[1], upright.height / size[0]) * crop_fraction
    width, height = size[1] * scale, size[0] * scale
    image = upright.decode(scale)
    scale_x, scale_y = image.width / upright.width, image.height / upright.height
    left, top = (upright.width - width) / 2, (upright.height - height) / 2
    box = (left * scale_x, top * scale_y, (left + width) * scale_x, (top + height) * scale_y)
    pixels = np.asarray(_resize(image, box, size, interpolation))
    out[...] = pixels.transpose(2, 0, 1) if pixels.ndim == 3 else pixels


def _resize(image: Image.Image, box: Box, size: tuple[int, ...], interpolation: Interpolation) -> Image.Image:
    # Rounding may carry a corner past the border by less than a pixel's millionth.
    inside = (max(box[0], 0.0), max(box[1], 0.0), min(box[2], float(image.width)), min(box[3], float(image.height)))
    try:
        return image.resize((size[1], size[0]), _RESAMPLING[interpolation], box=inside, reducing_gap=_REDUCING_GAP)
    except (ValueError, MemoryError):
        raise SkipImageError(SkipReason.UNDECODABLE) from None
