"""Coarser and finer canvases: weighted pooling by 2^l on every axis, and linear upsampling with weights."""

import itertools
from enum import StrEnum

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from hjepa_models._validation import coerce_choice
from hjepa_models.canvas import Canvas
from hjepa_models.grid import Grid, coarsen, num_tokens, upsampling_matrix


class Pooling(StrEnum):
    """How the tokens of a coarser level are made."""

    grid = "grid"
    sequence = "sequence"
    learned = "learned"


def max_levels(grid: Grid, pooling: Pooling | str = Pooling.grid, *, pad: bool = False) -> int:
    """Return how many levels a grid admits: until one cell is left, or, for an unpadded sequence, while 2 divides it.

    >>> max_levels((14, 14)), max_levels((14, 14), "sequence")
    (5, 3)
    """
    pooling = coerce_choice(Pooling, "pooling", pooling)
    count = num_tokens(grid)
    if pooling is Pooling.sequence and not pad:
        return 1 + ((count & -count).bit_length() - 1)
    longest = count if pooling is Pooling.sequence else max(grid)
    return 1 + (longest - 1).bit_length()


def check_levels(grid: Grid, levels: int, pooling: Pooling, pad: bool) -> None:
    """Refuse more levels than the grid admits."""
    most = max_levels(grid, pooling, pad=pad)
    if levels > most:
        remedy = "use fewer levels or a finer grid"
        if pooling is Pooling.sequence and not pad:
            remedy = f"2^{levels - 1} does not divide the {num_tokens(grid)} tokens: use fewer levels or pad=true"
        raise ValueError(
            f"levels={levels}: more than the grid {grid} admits with pooling={pooling}; allowed: 1 to {most}; {remedy}"
        )


def pooling_grid(grid: Grid, pooling: Pooling) -> Grid:
    """Return the grid on which cells are laid: the flat sequence for `sequence`, else the grid itself."""
    return (num_tokens(grid),) if pooling is Pooling.sequence else grid


def pool_canvas(
    canvas: Canvas,
    level: int,
    pooling: Pooling | str = Pooling.grid,
    *,
    pad: bool = False,
    cell_weight: Float[Tensor, "S D"] | None = None,
) -> Canvas:
    r"""Average the known tokens of each cell of $2^l$ tokens per axis.

    $$y_c = \frac{\sum_{i \in c} a_i w_i x_i}{\sum_{i \in c} a_i w_i}, \qquad w_c = \frac1{|c|} \sum_{i \in c} w_i$$

    The border is rounded up: a cell there holds the $|c|$ tokens that exist, none is dropped. A cell without a known
    token has value 0 and weight 0.

    Args:
        canvas: the finest level.
        level: l; 0 changes nothing.
        pooling: `grid`, `learned` (cells on the grid) or `sequence` (neighbours in the flat order).
        pad: allow a sequence that $2^l$ does not divide; its last cell then holds fewer tokens.
        cell_weight: positive factors $a$ per place in a full cell (row-major) and channel; None means 1.

    Returns:
        The coarse canvas; its weight is the known share of each cell.

    Raises:
        ValueError: for a sequence that $2^l$ does not divide, unless padding is asked for.
    """
    pooling = coerce_choice(Pooling, "pooling", pooling)
    grid = pooling_grid(canvas.grid, pooling)
    if level == 0:
        return Canvas(canvas.values, canvas.weight, grid)
    stride = 2**level
    if pooling is Pooling.sequence and not pad and grid[0] % stride:
        raise ValueError(
            f"pooling=sequence: {stride} does not divide the {grid[0]} tokens at level {level}; "
            f"allowed: lengths divisible by {stride}; use pad=true, fewer levels or pooling=grid"
        )
    weight = _cells(canvas.weight.unsqueeze(-1), grid, stride)
    values = _cells(canvas.values, grid, stride)
    share = weight if cell_weight is None else weight * cell_weight
    total = share.sum(2)
    mean = (values * share).sum(2) / torch.where(total > 0, total, 1)
    known = weight.sum(2).squeeze(-1) / _cell_sizes(grid, stride, weight.device)
    return Canvas(mean, known, coarsen(grid, level))


def upsample_canvas(canvas: Canvas, grid: Grid, factor: int = 2) -> Canvas:
    r"""Interpolate a coarse canvas linearly to a finer grid, unknown tokens left out.

    With the (multi)linear matrix $U$ (`align_corners=False`): $x = U(wy) / Uw$ and the weight is $Uw$.

    Args:
        canvas: the coarse level.
        grid: the fine grid, whose cells of `factor` tokens per axis are the coarse tokens.
        factor: tokens of a cell per axis.

    Returns:
        The fine canvas; value 0 and weight 0 where nothing known is near.
    """
    with torch.autocast(canvas.values.device.type, enabled=False):
        matrix = upsampling_matrix(grid, canvas.grid, factor, canvas.values.device).to(canvas.values.dtype)
        weight = canvas.weight.to(matrix.dtype) @ matrix.T
        values = matrix @ (canvas.values * canvas.weight.to(matrix.dtype).unsqueeze(-1))
    return Canvas(values / torch.where(weight > 0, weight, 1).unsqueeze(-1), weight, grid)


def _cells(values: Float[Tensor, "B N D"], grid: Grid, stride: int) -> Float[Tensor, "B M S D"]:
    """Return the tokens cell by cell, zeros where a cell reaches over the border."""
    axes = range(len(grid))
    dense = values.reshape(len(values), *grid, -1)
    padding = [(0, -size % stride) for size in reversed(grid)]
    if any(after for _, after in padding):
        dense = torch.nn.functional.pad(dense, (0, 0, *itertools.chain.from_iterable(padding)))
    whole = " ".join(f"(g{axis} s{axis})" for axis in axes)
    cells, places = (" ".join(f"{letter}{axis}" for axis in axes) for letter in "gs")
    pattern = f"b {whole} d -> b ({cells}) ({places}) d"
    cut: Tensor = rearrange(dense, pattern, **{f"s{axis}": stride for axis in axes})
    return cut


def _cell_sizes(grid: Grid, stride: int, device: torch.device) -> Float[Tensor, " M"]:
    """Return how many tokens each cell holds."""
    sizes = torch.ones(1, device=device)
    for size in grid:
        start = torch.arange(0, size, stride, device=device)
        sizes = torch.kron(sizes, (size - start).clamp(max=stride).float())
    return sizes
