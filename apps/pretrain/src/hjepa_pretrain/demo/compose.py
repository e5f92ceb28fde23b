"""Composites of real images: a garment at a random place, scale, rotation and tint on a crop of a real photo.

Plain garments are no test for a learner, because the pixels themselves tell the classes apart. Here they hardly do, and
each picture comes with what a hierarchy can be probed for: class, exact mask, place, scale, rotation, tint, background.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from hjepa_pretrain.demo.garments import CLASS_NAMES, SIDE, Split, load_garments
from hjepa_pretrain.demo.photos import PHOTOS, load_photo

# Length of the garment's 28 pixels in units of the picture's side.
SCALE_RANGE = (0.55, 0.95)
ROTATION_RANGE = (-30.0, 30.0)
TINT_RANGE = (0.25, 1.0)
# Short side of a photo in units of the picture's side: from the whole photo to about a fifth of it.
PHOTO_SCALES = (1.25, 2.0, 3.0, 5.0)
# Small enough for the temporaries to stay in the cache.
_CHUNK = 256


@dataclass(kw_only=True, slots=True)
class DemoSet:
    """Composites and all that is known about them; S is the side in pixels.

    Attributes:
        images: [count, S, S, 3] uint8.
        labels: [count] class, an index into `CLASS_NAMES`.
        masks: [count, S, S] True where the garment covers at least half of the pixel.
        center: [count, 2] (y, x) of the garment's centre in units of the side, 0 = top or left, 1 = bottom or right.
        scale: [count] side of the garment's square in units of the picture's side.
        rotation: [count] in degrees, counter-clockwise.
        tint: [count, 3] factors of red, green and blue.
        garment: [count] index of the garment in its split.
        background: [count] index of the photo in `PHOTOS[split]`.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    masks: NDArray[np.bool_]
    center: NDArray[np.float32]
    scale: NDArray[np.float32]
    rotation: NDArray[np.float32]
    tint: NDArray[np.float32]
    garment: NDArray[np.int64]
    background: NDArray[np.int64]

    def __len__(self) -> int:
        """The number of composites."""
        return len(self.images)


def compose_demo(split: Split | str, count: int, seed: int, size: int = 32) -> DemoSet:
    """Composes `count` pictures; a pure function of its arguments.

    Args:
        split: "train" or "eval"; the two share neither a garment nor a photo.
        count: number of pictures; the classes are balanced to within one.
        seed: seed of all random draws.
        size: side of the square pictures in pixels.

    Returns:
        Pictures in random order with their labels, masks and factors.

    Raises:
        ValueError: the split is unknown, or a number is out of range.
    """
    if split not in tuple(Split):
        raise ValueError(f"split={split!r}: unknown; allowed: {', '.join(Split)}; choose one of them")
    if count < 1 or size < 8:
        raise ValueError(f"count={count}, size={size}: too small; allowed: count >= 1, size >= 8; raise them")
    split = Split(split)
    rng = np.random.default_rng([seed, tuple(Split).index(split)])
    values, silhouettes, garment_labels = load_garments(split)
    labels = rng.permutation(np.arange(count) % len(CLASS_NAMES))
    per_class = len(garment_labels) // len(CLASS_NAMES)
    garment = labels * per_class + rng.integers(0, per_class, count)
    scale = rng.uniform(*SCALE_RANGE, count).astype(np.float32)
    rotation = rng.uniform(*ROTATION_RANGE, count).astype(np.float32)
    tint = rng.uniform(*TINT_RANGE, (count, 3)).astype(np.float32)
    center = scale[:, None] / 2 + rng.random((count, 2), dtype=np.float32) * (1 - scale[:, None])
    background = rng.integers(0, len(PHOTOS[split]), count)
    images = _photo_crops(split, background, size, rng)
    masks = np.empty((count, size, size), dtype=np.bool_)
    for start in range(0, count, _CHUNK):
        part = slice(start, start + _CHUNK)
        sheet = np.stack([values[garment[part]] / 255.0, silhouettes[garment[part]]], axis=1).astype(np.float32)
        shade, alpha = _place(sheet, center[part], scale[part], rotation[part], size)
        paint = shade[..., None] * (255 * tint[part])[:, None, None, :]
        mixed = images[part] * (1 - alpha[..., None]) + paint
        images[part] = np.clip(np.rint(mixed), 0, 255).astype(np.uint8)
        masks[part] = alpha >= 0.5
    return DemoSet(
        images=images,
        labels=garment_labels[garment],
        masks=masks,
        center=center,
        scale=scale,
        rotation=rotation,
        tint=tint,
        garment=garment,
        background=background,
    )


def _place(
    sheet: NDArray[np.float32],
    center: NDArray[np.float32],
    scale: NDArray[np.float32],
    rotation: NDArray[np.float32],
    size: int,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Puts garments [n, 2, 28, 28] (grey, alpha) at their places; returns grey times alpha, and alpha, [n, S, S]."""
    # Sampled twice as fine and averaged: a garment is shrunk to about half at most, so no thread of it is skipped.
    fine = 2 if size < 2 * SIDE else 1
    axis = (torch.arange(fine * size, dtype=torch.float32) * 2 + 1) / (fine * size) - 1
    x, y = torch.from_numpy(2 * center[:, ::-1] - 1)[..., None, None].unbind(1)
    dx, dy = axis[None, None, :] - x, axis[None, :, None] - y
    # Picture coordinates in [-1, 1] map back to the garment's: rotated and scaled about the garment's centre.
    angle = torch.deg2rad(torch.from_numpy(rotation))
    cos, sin = (wave[:, None, None] / torch.from_numpy(scale)[:, None, None] for wave in (angle.cos(), angle.sin()))
    grid = torch.stack([cos * dx - sin * dy, sin * dx + cos * dy], dim=-1)
    premultiplied = torch.from_numpy(np.stack([sheet[:, 0] * sheet[:, 1], sheet[:, 1]], axis=1))
    placed = functional.grid_sample(premultiplied, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    shade, alpha = functional.avg_pool2d(placed, fine).unbind(1)
    return shade.numpy(), alpha.numpy()


def _photo_crops(split: Split, background: NDArray[np.int64], size: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Random crops [count, size, size, 3] of the given photos at random zoom, half of them mirrored."""
    zoom = rng.integers(0, len(PHOTO_SCALES), len(background))
    at = rng.random((len(background), 2))
    mirrored = rng.random(len(background)) < 0.5
    crops = np.empty((len(background), size, size, 3), dtype=np.uint8)
    for photo in range(len(PHOTOS[split])):
        for level, factor in enumerate(PHOTO_SCALES):
            chosen = np.flatnonzero((background == photo) & (zoom == level))
            pixels = load_photo(PHOTOS[split][photo], round(factor * size))
            windows = np.lib.stride_tricks.sliding_window_view(pixels, (size, size), axis=(0, 1))
            top, left = (at[chosen] * windows.shape[:2]).astype(np.int64).T
            crops[chosen] = windows[top, left].transpose(0, 2, 3, 1)
    crops[mirrored] = crops[mirrored, :, ::-1]
    return crops
