"""Geometry of token grids with any number of axes, flat index in row-major order."""

import math
from functools import reduce

import torch
from jaxtyping import Float, Int
from torch import Tensor

Grid = tuple[int, ...]


def num_tokens(grid: Grid) -> int:
    """Return how many tokens a grid holds.

    >>> num_tokens((14, 14))
    196
    """
    return math.prod(grid)


def coarsen(grid: Grid, level: int) -> Grid:
    """Return the grid of level `level`: every axis divided by 2^level, rounded up so that no token is dropped.

    >>> coarsen((37, 37), 2)
    (10, 10)
    """
    return tuple(-(-size // 2**level) for size in grid)


def grid_coordinates(
    grid: Grid, reference: Grid | None = None, device: torch.device | None = None
) -> Float[Tensor, "N A"]:
    r"""Return the coordinates of every token in row-major order.

    With a reference grid the coordinates are those of the token centres on that grid,
    $(i + 1/2) \cdot n_{ref} / n - 1/2$, so that another resolution sees interpolated positions.

    Args:
        grid: tokens per axis.
        reference: the grid that positions are measured on; None means `grid` itself.
        device: where the tensor is made.

    Returns:
        Coordinates in tokens, float32, one row per token and one column per axis.
    """
    axes = []
    for size, wanted in zip(grid, reference or grid, strict=True):
        axis = torch.arange(size, device=device, dtype=torch.float32)
        axes.append(axis if size == wanted else (axis + 0.5) * (wanted / size) - 0.5)
    return torch.stack([axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij")], dim=-1)


def sincos_positions(
    coordinates: Float[Tensor, "*B N A"], dim: int, theta: float = 10_000.0
) -> Float[Tensor, "*B N D"]:
    r"""Return fixed sine-cosine position embeddings of coordinates on any number of axes.

    Every axis fills an equal share of the width with $\sin(x\,\theta^{-i/n}), \cos(x\,\theta^{-i/n})$ for
    $i < n = \lfloor D / 2A \rfloor$; a remainder of the width that the axes cannot share stays zero.

    Args:
        coordinates: position in tokens, one column per axis.
        dim: width D of the embedding.
        theta: longest wavelength over 2π.

    Returns:
        Embeddings in float32.

    Source:
        Vaswani et al. 2017, section 3.5, with one share of the width per axis.
    """
    axes = coordinates.shape[-1]
    count = dim // (2 * axes)
    rate = theta ** -(torch.arange(count, device=coordinates.device, dtype=torch.float32) / max(count, 1))
    angle = coordinates.float().unsqueeze(-1) * rate
    embedding = torch.cat([angle.sin(), angle.cos()], dim=-1).flatten(-2)
    return torch.nn.functional.pad(embedding, (0, dim - embedding.shape[-1]))


def gather_tokens(values: Float[Tensor, "B N D"], index: Int[Tensor, "B K"]) -> Float[Tensor, "B K D"]:
    """Return the tokens of each sample at the flat positions `index`."""
    batch, count, width = values.shape
    offset = torch.arange(batch, device=index.device).unsqueeze(1) * count
    return values.reshape(batch * count, width).index_select(0, (index + offset).flatten()).view(batch, -1, width)


def hat_matrix(position: Float[Tensor, " n"], size: int) -> Float[Tensor, "n {size}"]:
    """Return the linear interpolation at positions along an axis of `size` tokens, clamped at its ends."""
    place = torch.arange(size, device=position.device, dtype=position.dtype)
    return (1 - (position.clamp(0, size - 1).unsqueeze(1) - place).abs()).clamp(min=0)


def axis_upsampling(size: int, coarse: int, factor: float, device: torch.device) -> Float[Tensor, "n m"]:
    r"""Return the linear interpolation along one axis, from `coarse` cells of `factor` tokens to `size` tokens.

    Token $i$ reads the coarse axis at $(i + 1/2) / factor - 1/2$ (`align_corners=False`), clamped at the ends. The
    factor is the true size of a cell, so an axis that was rounded up keeps its cells in place.
    """
    return hat_matrix((torch.arange(size, device=device, dtype=torch.float32) + 0.5) / factor - 0.5, coarse)


def upsampling_matrix(grid: Grid, coarse: Grid, factor: int, device: torch.device) -> Float[Tensor, "N M"]:
    """Return the multilinear interpolation from the tokens of `coarse` to those of `grid`, any number of axes."""
    axes = [axis_upsampling(size, small, factor, device) for size, small in zip(grid, coarse, strict=True)]
    return reduce(torch.kron, axes)


def resampling_matrix(grid: Grid, reference: Grid, device: torch.device) -> Float[Tensor, "N M"]:
    """Return the multilinear interpolation from `reference` to a finer or coarser `grid` of the same extent."""
    axes = [axis_upsampling(size, old, size / old, device) for size, old in zip(grid, reference, strict=True)]
    return reduce(torch.kron, axes)
