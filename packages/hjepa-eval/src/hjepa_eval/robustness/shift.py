"""Other changes of images with one strength to turn up: rotation, occlusion, lower resolution."""

import math

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from hjepa_eval.robustness.corrupt import check_images, numbers
from hjepa_eval.robustness.draws import Draws
from hjepa_eval.robustness.maps import area_matrix, read_between, separable

Pixels = UInt8[Tensor, "B 3 H W"]


def rotate(images: Pixels, degrees: float) -> Pixels:
    """Rotate about the centre, counter-clockwise; what was outside is the image's mean colour.

    Args:
        images: Pixels.
        degrees: Angle.

    Returns:
        The rotated images, read bilinearly.
    """
    check_images(images, None)
    height, width = images.shape[-2:]
    cy, cx = (height - 1) / 2, (width - 1) / 2
    rows, columns = (torch.arange(n, device=images.device, dtype=torch.float32) for n in (height, width))
    dy, dx = torch.meshgrid(rows - cy, columns - cx, indexing="ij")
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    y_at, x_at = (cy + cos * dy + sin * dx).expand(len(images), -1, -1), (cx + cos * dx - sin * dy)
    x = images.float()
    turned = read_between(x, y_at, x_at.expand(len(images), -1, -1), border="nearest")
    inside = (y_at > -0.5) & (y_at < height - 0.5) & (x_at > -0.5) & (x_at < width - 0.5)
    return torch.where(inside[:, None], turned, _mean(x)).round().to(torch.uint8)


def occlude(
    images: Pixels,
    share: float,
    *,
    patch: int | None = None,
    samples: Int[Tensor, " B"] | None = None,
    seed: int = 0,
) -> Pixels:
    """Cover a share of square patches, drawn anew for each image, with the image's mean colour.

    Patches that are covered at a small share are covered at every larger one.

    Args:
        images: Pixels.
        share: Share of the patches, in [0, 1].
        patch: Side of a patch in pixels; None: an eighth of the short side.
        samples: Numbers of the images in their data set; None: 0, 1, ...
        seed: Of the draws.

    Returns:
        The images.

    Raises:
        ValueError: Where the share or the patch is out of range.
    """
    check_images(images, samples)
    height, width = images.shape[-2:]
    patch = max(1, min(height, width) // 8) if patch is None else patch
    if not 0 <= share <= 1 or not 1 <= patch <= min(height, width):
        raise ValueError(f"share={share} patch={patch}: a share in [0, 1] and a side from 1 to the image's")
    if not len(images):
        return images
    grid = (-(-height // patch), -(-width // patch))
    draws = Draws(seed, numbers(images, samples), "occlude", device=images.device)
    rank = draws.uniform(0, 1, grid[0] * grid[1]).argsort(dim=1).argsort(dim=1).view(-1, *grid)
    covered = (rank < round(share * grid[0] * grid[1])).repeat_interleave(patch, 1).repeat_interleave(patch, 2)
    x = images.float()
    return torch.where(covered[:, None, :height, :width], _mean(x), x).round().to(torch.uint8)


def lower_resolution(images: Pixels, share: float) -> Pixels:
    """Shrink to a share of each side by area means, and enlarge again bilinearly.

    Args:
        images: Pixels.
        share: Share of each side that is left, in (0, 1].

    Returns:
        Images of the old size.

    Raises:
        ValueError: Where the share is out of range.
    """
    check_images(images, None)
    if not 0 < share <= 1:
        raise ValueError(f"share={share}: allowed: above 0, up to 1")
    height, width = images.shape[-2:]
    small = tuple(max(1, round(share * n)) for n in (height, width))
    if small == (height, width):
        return images
    x = separable(images.float(), area_matrix(height, small[0]), area_matrix(width, small[1]))
    x = torch.nn.functional.interpolate(x, size=(height, width), mode="bilinear", align_corners=False)
    return x.round().clamp(0, 255).to(torch.uint8)


def _mean(x: Tensor) -> Tensor:
    return x.mean(dim=(2, 3), keepdim=True).round()
