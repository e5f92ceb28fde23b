"""Rectangles on a grid (h, w), many at once, and the cells that they leave free."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hjepa_data.random import integers_below

__all__ = ["Rectangles", "free_cells", "place_rectangles"]


@dataclass(slots=True)
class Rectangles:
    """Rectangles by their top row, left column, height and width; any leading shape."""

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor

    def take(self, candidate: Int[Tensor, " B"]) -> Rectangles:
        """Choose one of the candidates [B, C, ...] of each image."""
        row = torch.arange(len(candidate), device=candidate.device)
        return Rectangles(*(field[row, candidate] for field in (self.top, self.left, self.height, self.width)))

    def rows(self, grid_height: int) -> Bool[Tensor, "*B H"]:
        """Mark the rows of the grid that each rectangle crosses."""
        place = torch.arange(grid_height, device=self.top.device)
        return (place >= self.top[..., None]) & (place < (self.top + self.height)[..., None])

    def columns(self, grid_width: int) -> Bool[Tensor, "*B W"]:
        """Mark the columns of the grid that each rectangle crosses."""
        place = torch.arange(grid_width, device=self.left.device)
        return (place >= self.left[..., None]) & (place < (self.left + self.width)[..., None])


def place_rectangles(
    random: Int[Tensor, "*B 2"], height: Tensor | int, width: Tensor | int, rows: int, columns: int
) -> Rectangles:
    """Place rectangles of the given sizes uniformly within the first ``rows`` and ``columns`` of the grid."""
    top = integers_below(random[..., 0], rows - height + 1)
    left = integers_below(random[..., 1], columns - width + 1)
    if isinstance(height, int):
        height = torch.full_like(top, height)
    if isinstance(width, int):
        width = torch.full_like(left, width)
    return Rectangles(top, left, height, width)


def free_cells(
    targets: Rectangles, context: Rectangles, height: int, width: int
) -> tuple[Bool[Tensor, "*B N"], Int[Tensor, "*B"]]:
    """Find the cells of each context rectangle that none of its targets [*B, M] covers, and their number."""
    # A matrix product over the blocks counts how many of them cover each cell.
    covered = targets.rows(height).float().transpose(-1, -2) @ targets.columns(width).float()
    inside = context.rows(height)[..., :, None] & context.columns(width)[..., None, :]
    free = (inside & (covered == 0)).flatten(-2)
    return free, free.sum(-1)
