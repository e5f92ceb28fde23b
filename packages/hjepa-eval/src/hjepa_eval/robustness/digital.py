"""Digital: contrast, elastic transform, pixelate, JPEG. Images are [B, 3, H, W] in [0, 1]."""

import math
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from hjepa_eval.robustness.draws import Draws
from hjepa_eval.robustness.maps import Images, box_matrix, gaussian_blur, outside, read_between, separable

_LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61), (12, 12, 14, 19, 26, 58, 60, 55), (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62), (18, 22, 37, 56, 68, 109, 103, 77), (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101), (72, 92, 95, 98, 112, 100, 103, 99),
)  # fmt: skip
_CHROMINANCE = (
    (17, 18, 24, 47, 99, 99, 99, 99), (18, 21, 26, 66, 99, 99, 99, 99), (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99), *((99,) * 8 for _ in range(4)),
)  # fmt: skip
_TO_YCC = ((0.299, 0.587, 0.114), (-0.168735892, -0.331264108, 0.5), (0.5, -0.418687589, -0.081312411))
_TO_RGB = ((1.0, 0.0, 1.402), (1.0, -0.344136286, -0.714136286), (1.0, 1.772, 0.0))


def contrast(x: Images, factor: float, draws: Draws) -> Images:
    """Distance to the image's mean colour, times a factor."""
    mean = x.mean(dim=(2, 3), keepdim=True)
    return (x - mean) * factor + mean


def pixelate(x: Images, share: float, draws: Draws) -> Images:
    """Fewer pixels (a share of each side), and the old number again, both by boxes."""
    height, width = x.shape[-2:]
    fewer = (max(1, int(height * share)), max(1, int(width * share)))
    # Pillow resizes columns, then rows, and rounds halves up after each; the thousandth is float32's.
    small = (x * 255 @ box_matrix(width, fewer[1]).to(x).T + 0.501).floor()
    small = (box_matrix(height, fewer[0]).to(x) @ small + 0.501).floor() / 255
    return separable(small, box_matrix(fewer[0], height), box_matrix(fewer[1], width))


def elastic_transform(x: Images, parameters: tuple[float, float, float], draws: Draws) -> Images:
    """A random affine map, then smooth random displacements: (their size, their smoothness, size of the affine map).

    All in units of the short side. The affine map moves three corners of a square of a third of the side about the
    centre, each by up to its size.
    """
    height, width = x.shape[-2:]
    side = min(height, width)
    strength, smoothness, affine = (side * part for part in parameters)
    rows, columns = (torch.arange(n, device=x.device, dtype=torch.float32) for n in (height, width))
    y_at, x_at = torch.meshgrid(rows, columns, indexing="ij")
    x = read_between(x, *_affine(y_at, x_at, side // 3, affine, draws), border="mirror")
    noise = draws.uniform(-1, 1, 2, height, width)
    if strength == 0:
        return x
    moved = strength * gaussian_blur(noise, smoothness, truncate=3.0, border="reflect")
    return read_between(x, y_at + moved[:, 0], x_at + moved[:, 1], border="reflect")


def _affine(y: Tensor, x: Tensor, square: int, size: float, draws: Draws) -> tuple[Tensor, Tensor]:
    """Where each pixel of the result lies in the image."""
    cy, cx = float(y.shape[0] // 2), float(y.shape[1] // 2)
    corners = y.new_tensor([[cx + square, cy + square], [cx + square, cy - square], [cx - square, cy - square]])
    moved = (corners + draws.uniform(-size, size, 3, 2)).double()
    ones = moved.new_ones(len(moved), 3, 1)
    # The map from moved corners back to corners: [moved, 1] @ M = corners.
    back = torch.linalg.solve(torch.cat((moved, ones), dim=2), corners.double().expand(len(moved), 3, 2))
    points = torch.stack((x, y, torch.ones_like(x)), dim=-1).double()
    found = torch.einsum("hwk,bkc->bhwc", points, back).float()
    return found[..., 1], found[..., 0]


def jpeg_compression(x: Images, quality: int, draws: Draws) -> Images:
    """What baseline JPEG does to pixels: YCbCr, chroma at half size, quantised 8x8 cosine transforms, and back.

    Quality scales the tables of Annex K as libjpeg does; entropy coding, which loses nothing, is left out.

    Source:
        ITU-T T.81, sections A.3 and K.1; libjpeg's quality scale and triangle filter for chroma.
    """
    height, width = x.shape[-2:]
    ycc = torch.einsum("dc,bchw->bdhw", x.new_tensor(_TO_YCC), (x * 255).round()).round()
    down, right = (torch.arange(-(-n // 16) * 16, device=x.device) for n in (height, width))
    ycc = ycc[..., outside(down, height, "nearest")[:, None], outside(right, width, "nearest")]
    luma = _quantise(ycc[:, :1] - 128, _table(_LUMINANCE, quality))[..., :height, :width]
    halved = F.avg_pool2d(ycc[:, 1:], 2)
    # libjpeg rounds halves up and down in turn.
    bias = torch.where(torch.arange(halved.shape[-1], device=x.device) % 2 == 0, 0.25, 0.5)
    chroma = _quantise((halved + bias).floor(), _table(_CHROMINANCE, quality))
    chroma = chroma[..., : -(-height // 2), : -(-width // 2)]
    chroma = F.interpolate(chroma, scale_factor=2, mode="bilinear", align_corners=False)[..., :height, :width]
    parts = torch.cat((luma + 128, chroma.round()), dim=1)
    return torch.einsum("dc,bchw->bdhw", x.new_tensor(_TO_RGB), parts).round().clamp(0, 255) / 255


def _quantise(plane: Float[Tensor, "B c H W"], table: Float[Tensor, "8 8"]) -> Float[Tensor, "B c H W"]:
    """Cosine transforms of 8x8 blocks, rounded to multiples of a table, transformed back; values about 0."""
    cosines, table = _cosines().to(plane), table.to(plane)
    batch, channels, height, width = plane.shape
    blocks = plane.view(batch, channels, height // 8, 8, width // 8, 8).transpose(3, 4)
    coefficients = cosines @ blocks @ cosines.T
    kept = (coefficients / table).round() * table
    back = (cosines.T @ kept @ cosines).round().clamp(-128, 127)
    return back.transpose(3, 4).reshape(plane.shape)


@cache
def _cosines() -> Float[Tensor, "8 8"]:
    index = torch.arange(8, dtype=torch.float64)
    matrix = (math.pi / 16 * (2 * index + 1) * index[:, None]).cos() / 2
    matrix[0] /= math.sqrt(2)
    return matrix.float()


def _table(base: tuple[tuple[int, ...], ...], quality: int) -> Float[Tensor, "8 8"]:
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    return ((torch.tensor(base) * scale + 50) // 100).clamp(1, 255).float()
