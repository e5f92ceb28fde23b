"""The canvas: the dense form of a token set, with a weight that says which tokens are known."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hjepa_models.grid import Grid, num_tokens


@dataclass(frozen=True, slots=True)
class Canvas:
    """Tokens on every position of a grid.

    Attributes:
        values: features; what stands where the weight is 0 has no meaning.
        weight: 1 where a token is known, 0 where it is not, between them on coarse levels.
        grid: tokens per axis, row-major.
    """

    values: Float[Tensor, "B N D"]
    weight: Float[Tensor, "B N"]
    grid: Grid


def scatter_to_canvas(tokens: Float[Tensor, "B K D"], index: Int[Tensor, "B K"], grid: Grid) -> Canvas:
    """Put a token set on its grid; tokens that share a position are averaged, the rest of the grid has weight 0.

    Args:
        tokens: features.
        index: their flat positions.
        grid: tokens per axis.

    Returns:
        The canvas, in float32 (or the wider dtype of the tokens).
    """
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    batch, _, width = tokens.shape
    total = tokens.new_zeros(batch, num_tokens(grid), width, dtype=dtype)
    total = total.scatter_add(1, index.unsqueeze(-1).expand(-1, -1, width), tokens.to(dtype))
    count = tokens.new_zeros(batch, num_tokens(grid), dtype=dtype)
    count = count.scatter_add(1, index, torch.ones_like(index, dtype=dtype))
    return Canvas(total / count.clamp(min=1).unsqueeze(-1), count.clamp(max=1), grid)


def dense_canvas(tokens: Float[Tensor, "B N D"], grid: Grid) -> Canvas:
    """Return the canvas of a whole grid of tokens, every weight 1."""
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    return Canvas(tokens.to(dtype), tokens.new_ones(tokens.shape[:2], dtype=dtype), grid)
