"""Boxes on a grid, many at once: what they cross along each axis, and the cells that they leave free.

All boxes of a draw, and all axes of the grid, go through each operation together: on a GPU a draw costs its number of
launches, not its arithmetic. What follows from the size of a box is therefore looked up.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

__all__ = ["blocked_cells", "cell_of_block", "free_cells", "line_origin", "line_table", "lines", "take_candidate"]


def line_table(longest: int) -> Float[Tensor, " L"]:
    """Tabulate what a box crosses of an axis: ``longest`` zeros and then ones, for each size; at last their negatives.

    A window of ``longest`` entries that begins ``start`` before the ones of a size marks the places from ``start`` on.
    """
    place = torch.arange(2 * longest) - longest
    ones = ((place >= 0) & (place < torch.arange(longest + 1)[:, None])).float()
    return torch.stack([ones, -ones]).flatten()


def line_origin(size: Int[Tensor, "*B"], longest: int, *, negative: bool = False) -> Int[Tensor, "*B"]:
    """Find the first one (or minus one) of a size in ``line_table``."""
    return (size + negative * (longest + 1)) * 2 * longest + longest


def lines(
    table: Num[Tensor, " L"], start: Int[Tensor, "*B axes"], origin: Int[Tensor, "*#B axes"], longest: int
) -> Num[Tensor, "*B axes longest"]:
    """Mark the rows, columns and so on that each box crosses."""
    return table.unfold(0, longest, 1)[origin - start]


def blocked_cells(
    table: Float[Tensor, " L"], start: Int[Tensor, "*B M1 2"], origin: Int[Tensor, "*#B M1 2"], grid: tuple[int, ...]
) -> Bool[Tensor, "*B N"]:
    """Mark the cells that are not free for the context: outside its rectangle, the last, or within any other.

    Args:
        table: as ``line_table`` has it.
        start: of the target rectangles and of the context's.
        origin: of their sizes; that of the context's height is negative.
        grid: its height and width.

    Returns:
        True where no token of the context may be.
    """
    height, width = grid
    crossed = lines(table, start, origin, max(grid))
    # A matrix product over the rectangles counts how many targets cover each cell; less the context it is below 0 on
    # the cells of the context alone.
    count = crossed[..., 0, :height].transpose(-1, -2) @ crossed[..., 1, :width]
    return (count >= 0).flatten(-2)


def free_cells(start: Int[Tensor, "*B M1 2"], size: Int[Tensor, "M1 2"]) -> Int[Tensor, "*B"]:
    """Count the cells of the last rectangle that lie in no other: those that ``blocked_cells`` leaves free.

    The edges of the others cut each axis into 2 M - 1 pieces, each of which they cover as a whole or not at all: on a
    large grid those are far fewer than its cells.

    Args:
        start: of the target rectangles and of the context's.
        size: their sides.
    """
    low, high = start[..., -1:, :], start[..., -1:, :] + size[-1]
    first = start[..., :-1, :].clamp(low, high)
    end = (start[..., :-1, :] + size[:-1]).clamp(low, high)
    edge = torch.cat([first, end], dim=-2).sort(dim=-2).values
    piece, length = edge[..., :-1, None, :], edge.diff(dim=-2).float()
    crossed = ((first[..., None, :, :] <= piece) & (piece < end[..., None, :, :])).float()
    covered = (crossed[..., 0] @ crossed[..., 1].transpose(-1, -2)).clamp_(max=1)
    area = (length[..., 0][..., None, :] @ covered @ length[..., 1][..., None]).flatten(-3)
    return size[-1].prod() - area.long()


def cell_of_block(cells: int, grid_width: int) -> Int[Tensor, "W1 cells"]:
    """Tabulate the cell of the grid that is cell j of a block at its top left, for each width of the block."""
    width, cell = torch.arange(grid_width + 1)[:, None], torch.arange(cells)
    row = cell // width.clamp(min=1)
    return row * grid_width + cell - row * width


def take_candidate(values: Tensor, candidate: Int[Tensor, " B"]) -> Tensor:
    """Take one of the candidates [B, C, ...] of each image."""
    index = candidate.view(-1, *(1,) * (values.ndim - 1)).expand(-1, 1, *values.shape[2:])
    return values.gather(1, index).squeeze(1)
