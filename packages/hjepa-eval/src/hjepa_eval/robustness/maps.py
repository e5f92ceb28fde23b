"""Linear maps of images: separable ones as a matrix of rows and one of columns, kernels, and reading between pixels."""

import math
from collections.abc import Sequence
from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

Images = Float[Tensor, "B C H W"]


def separable(x: Images, rows: Float[Tensor, "h H"], columns: Float[Tensor, "w W"]) -> Float[Tensor, "B C h w"]:
    """Apply a map to the rows and one to the columns: rows @ x @ columns^T."""
    return rows.to(x) @ x @ columns.to(x).T


def gaussian_blur(x: Images, sigma: float, *, truncate: float = 4.0, border: str = "nearest") -> Images:
    """Blur with a sampled Gaussian of radius round(truncate * sigma).

    Args:
        x: Images.
        sigma: Standard deviation, pixels; 0 leaves x as it is.
        truncate: Radius in units of sigma.
        border: What lies outside, see outside.
    """
    if sigma <= 0:
        return x
    height, width = x.shape[-2:]
    return separable(
        x, gaussian_matrix(height, sigma, truncate, border), gaussian_matrix(width, sigma, truncate, border)
    )


@cache
def gaussian_matrix(size: int, sigma: float, truncate: float, border: str) -> Float[Tensor, "n n"]:
    """The Gaussian filter of a line of n pixels as a matrix."""
    radius = int(truncate * sigma + 0.5)
    offsets = torch.arange(-radius, radius + 1)
    weight = torch.exp(-0.5 * (offsets.double() / sigma) ** 2)
    weight /= weight.sum()
    at = outside(torch.arange(size)[:, None] + offsets, size, border)
    matrix = torch.zeros(size, size, dtype=torch.float64)
    return matrix.scatter_add_(1, at, weight.expand(size, -1)).float()


def box_matrix(size: int, target: int) -> Float[Tensor, "m n"]:
    """Resizing of a line of n pixels to m: the mean of the pixels whose centres lie in a target pixel."""
    scale = size / target
    support = max(1.0, scale) / 2
    matrix = torch.zeros(target, size)
    for row in range(target):
        centre = (row + 0.5) * scale
        first, last = max(0, int(centre - support + 0.5)), min(size, int(centre + support + 0.5))
        matrix[row, first:last] = 1 / (last - first)
    return matrix


def zoom_matrix(size: int, factor: float) -> Float[Tensor, "n n"]:
    """The central n / factor of n pixels, enlarged linearly to n (end pixels stay end pixels)."""
    kept = math.ceil(size / factor)
    enlarged = round(kept * factor)
    start, trimmed = (size - kept) // 2, (enlarged - size) // 2
    at = (torch.arange(size) + trimmed).double() * ((kept - 1) / max(1, enlarged - 1)) + start
    below = at.floor().clamp(0, size - 1)
    part = at - below
    matrix = torch.zeros(size, size, dtype=torch.float64)
    matrix.scatter_add_(1, below.long()[:, None], (1 - part)[:, None])
    matrix.scatter_add_(1, (below.long() + 1).clamp_max(size - 1)[:, None], part[:, None])
    return matrix.float()


def area_matrix(size: int, target: int) -> Float[Tensor, "m n"]:
    """Resizing of a line of n pixels to m: the mean over the length that a target pixel covers."""
    edges = torch.arange(target + 1, dtype=torch.float64) * (size / target)
    pixels = torch.arange(size, dtype=torch.float64)
    covered = torch.minimum(edges[1:, None], pixels + 1) - torch.maximum(edges[:-1, None], pixels)
    return (covered.clamp_min(0) * (target / size)).float()


def convolve(x: Images, kernel: Float[Tensor, "k k"]) -> Images:
    """Correlate every channel with one kernel of odd size; the border is mirrored about its pixels."""
    radius = kernel.shape[0] // 2
    height, width = x.shape[-2:]
    rows = outside(torch.arange(-radius, height + radius, device=x.device), height, "mirror")
    columns = outside(torch.arange(-radius, width + radius, device=x.device), width, "mirror")
    padded = x[..., rows[:, None], columns]
    flat = padded.flatten(0, 1)[:, None]
    return F.conv2d(flat, kernel.to(x)[None, None]).view(x.shape)


def read_shifted(x: Images, dy: Int[Tensor, " B"], dx: Int[Tensor, " B"]) -> Images:
    """Each image read dy rows below and dx columns to the right of each pixel; border pixels go on outside."""
    batch, _, height, width = x.shape
    rows = outside(torch.arange(height, device=x.device) + dy[:, None], height, "nearest")
    columns = outside(torch.arange(width, device=x.device) + dx[:, None], width, "nearest")
    number = torch.arange(batch, device=x.device)[:, None, None]
    return x.permute(0, 2, 3, 1)[number, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def read_between(x: Images, y_at: Float[Tensor, "B h w"], x_at: Float[Tensor, "B h w"], border: str) -> Images:
    """Each image read at given places, in pixels (centres at integers), by bilinear interpolation."""
    batch, channels, height, width = x.shape
    top, left = y_at.floor(), x_at.floor()
    down, right = y_at - top, x_at - left
    flat, found = x.flatten(2), torch.zeros(batch, channels, *y_at.shape[1:], device=x.device)
    for dy, weight_y in ((0, 1 - down), (1, down)):
        rows = outside(top.long() + dy, height, border)
        for dx, weight_x in ((0, 1 - right), (1, right)):
            index = rows * width + outside(left.long() + dx, width, border)
            values = flat.gather(2, index.flatten(1)[:, None].expand(-1, channels, -1))
            found += values.view(found.shape) * (weight_y * weight_x)[:, None]
    return found


def outside(at: Int[Tensor, "..."], size: int, border: str) -> Int[Tensor, "..."]:
    """Turn positions that may lie outside of 0 to n - 1 into positions inside.

    Args:
        at: Positions.
        size: n.
        border: "nearest" (aaa|abcd|ddd), "reflect" (cba|abcd|dcb) or "mirror" (dcb|abcd|cba).
    """
    if border == "nearest":
        return at.clamp(0, size - 1)
    if border == "reflect":
        folded = at % (2 * size)
        return torch.minimum(folded, 2 * size - 1 - folded)
    period = max(1, 2 * size - 2)
    folded = at % period
    return torch.minimum(folded, period - folded)


def disk_kernel(radius: float, alias_sigma: float) -> Float[Tensor, "k k"]:
    """A disk of a radius in pixels, its rim softened by a Gaussian of 3 taps (5 above a radius of 8)."""
    reach = 8 if radius <= 8 else int(radius)
    soft = 1 if radius <= 8 else 2
    line = torch.arange(-reach, reach + 1, dtype=torch.float64)
    disk = ((line[:, None] ** 2 + line**2) <= radius**2).double()
    taps = torch.exp(-0.5 * (torch.arange(-soft, soft + 1).double() / alias_sigma) ** 2)
    taps /= taps.sum()
    kernel = convolve((disk / disk.sum())[None, None], taps[:, None] * taps)[0, 0]
    # The kernel of a small disk is mostly zeros around it.
    used = min(reach, math.ceil(radius) + soft)
    return kernel[reach - used : reach + used + 1, reach - used : reach + used + 1].float()


def trail_blur(x: Images, radius: float, sigma: float, angle: Float[Tensor, " B"]) -> Images:
    """Smear each image to one side: half a Gaussian of 2 ceil(radius) + 1 taps along an angle in degrees.

    Source:
        What ImageMagick calls motion blur, which the published sets are made with.
    """
    width = 2 * math.ceil(radius) + 1
    taps = torch.exp(-0.5 * (torch.arange(width, dtype=torch.float64) / sigma) ** 2)
    weights: Sequence[float] = (taps / taps.sum()).tolist()
    radians = torch.deg2rad(angle.double())
    result = torch.zeros_like(x)
    for step, weight in enumerate(weights):
        # Below this all taps together change no pixel by a hundredth of a level.
        if weight < 1e-6:
            break
        dy, dx = ((step * part - 0.5).ceil().long() for part in (radians.sin(), radians.cos()))
        result += weight * read_shifted(x, dy, dx)
    return result
