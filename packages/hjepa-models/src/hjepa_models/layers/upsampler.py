"""From coarse tokens to the finer tokens that are asked for, and to no others."""

import math
from collections.abc import Sequence
from enum import StrEnum

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hjepa_models._validation import check_positive, coerce_choice
from hjepa_models.canvas import Canvas
from hjepa_models.grid import Grid, gather_tokens, grid_coordinates, num_tokens, sincos_positions
from hjepa_models.initialization import initialize
from hjepa_models.random import fold_in, row_seeds

PLACE_DIM = 64
PLACE_CYCLES = 4.0
"""Periods per cell of the fastest sine of `place_embedding`: neighbours at ratio 8 are half a period apart."""


class Upsampling(StrEnum):
    """How finer tokens are made of coarse ones."""

    bilinear = "bilinear"
    learned = "learned"


def upsampling_ratio(grid: Grid, output_grid: Grid) -> Grid:
    """Return how many output tokens a coarse token covers along each axis.

    Raises:
        ValueError: for an output grid that is no multiple of the grid.

    >>> upsampling_ratio((4, 8, 8), (4, 64, 64))
    (1, 8, 8)
    """
    if len(grid) != len(output_grid) or any(out % size for size, out in zip(grid, output_grid, strict=True)):
        raise ValueError(
            f"output_grid={output_grid}: is no multiple of the grid {grid} on every axis; "
            f"allowed: e.g. {tuple(2 * size for size in grid)}; use an output patch that divides the processing patch"
        )
    return tuple(out // size for size, out in zip(grid, output_grid, strict=True))


def interpolate_at(
    canvas: Canvas, output_grid: Grid, output_index: Int[Tensor, "B K"] | None = None
) -> Float[Tensor, "B K D"]:
    r"""Interpolate a coarse canvas linearly at tokens of a finer grid, unknown coarse tokens left out.

    $$y_i = \frac{\sum_c u_{ic} w_c x_c}{\sum_c u_{ic} w_c}$$

    over the $2^A$ corners $c$ around token $i$, with the multilinear weights $u$ (`align_corners=False`: token $i$
    reads an axis of ratio $r$ at $(i + 1/2)/r - 1/2$, clamped). Cost and memory grow with the tokens that are asked
    for; the output grid is never laid out.

    Args:
        canvas: the coarse tokens.
        output_grid: tokens per axis of the output, a multiple of the canvas's grid; the ratio may differ by axis.
        output_index: flat positions on the output grid; None means all, row-major.

    Returns:
        Features in float32 (or the wider dtype of the canvas), in the order of `output_index`; 0 where no corner is
        known.

    Raises:
        ValueError: for an output grid that is no multiple of the canvas's.
    """
    ratio = upsampling_ratio(canvas.grid, output_grid)
    dtype = torch.promote_types(canvas.values.dtype, torch.float32)
    values, weight = canvas.values.to(dtype), canvas.weight.to(dtype)
    index = _all_if_none(output_index, output_grid, values)
    corners = _corners(index, canvas.grid, output_grid, ratio, dtype)
    shares = [share * weight.gather(1, corner) for corner, share in corners]
    total = torch.stack(shares).sum(0)
    scale = 1 / torch.where(total > 0, total, 1)
    mixed = torch.zeros((), dtype=dtype, device=values.device)
    for (corner, _), share in zip(corners, shares, strict=True):
        mixed = mixed + gather_tokens(values, corner) * (share * scale).unsqueeze(-1)
    return mixed


class PatchUpsampler(nn.Module):
    r"""Makes the tokens of a finer grid out of coarse ones, at any ratio.

    `bilinear` interpolates and has no parameters. `learned` adds a residual that sees the nearest coarse token $z$, the
    offset $o$ of the output token from its centre and the size $1/r$ of the output token, both in coarse tokens
    and embedded ($\phi$, see `place_embedding`):

    $$y = \mathrm{interpolate}(x) + W_3\,\mathrm{GELU}(W_1 z + W_2\,\phi(o, 1/r) + b_1) + b_3$$

    The last map starts at zero, so that `learned` starts as `bilinear`. $W_1$ is applied to the coarse tokens and $W_2$
    to one embedding per place in a cell; only the last map runs over the output tokens. The residual also stands at
    ratio 1, so that a schedule of patch sizes does not lose what it learned at its end.

    Args:
        dim: width of a token.
        kind: `bilinear` or `learned`.
        hidden_dim: width inside the residual.

    Source:
        Chen et al. 2020 (LIIF, arXiv 2012.09161), section 3: local implicit function of the nearest feature and the
        relative coordinate (equation 2), with cell decoding.
    """

    def __init__(self, dim: int, kind: Upsampling | str = Upsampling.bilinear, hidden_dim: int = 256) -> None:
        super().__init__()
        check_positive(dim=dim, hidden_dim=hidden_dim)
        self.kind = coerce_choice(Upsampling, "kind", kind)
        if self.kind is Upsampling.learned:
            self.token = nn.Linear(dim, hidden_dim)
            self.place = nn.Linear(PLACE_DIM, hidden_dim, bias=False)
            self.activation = nn.GELU()
            self.output = nn.Linear(hidden_dim, dim)

    def init_weights(self, generator: torch.Generator) -> None:
        """Fill every parameter from a CPU generator; the residual starts at zero."""
        initialize(self, generator, fan_in=True)
        if self.kind is Upsampling.learned:
            nn.init.zeros_(self.output.weight)

    def forward(
        self, canvas: Canvas, output_grid: Grid, output_index: Int[Tensor, "B K"] | None = None
    ) -> Float[Tensor, "B K D"]:
        """Return the tokens of a finer grid at the positions that are asked for.

        Args:
            canvas: the coarse tokens.
            output_grid: tokens per axis of the output, a multiple of the canvas's grid.
            output_index: flat positions on the output grid; None means all, row-major.

        Returns:
            Features in float32 (or the wider dtype of the canvas); 0 where nothing known is near.

        Raises:
            ValueError: for an output grid that is no multiple of the canvas's.
        """
        smooth = interpolate_at(canvas, output_grid, output_index)
        if self.kind is Upsampling.bilinear:
            return smooth
        ratio = upsampling_ratio(canvas.grid, output_grid)
        index = _all_if_none(output_index, output_grid, canvas.values)
        places = _unravel(index, output_grid)
        nearest = _ravel([place // factor for place, factor in zip(places, ratio, strict=True)], canvas.grid)
        inside = _ravel([place % factor for place, factor in zip(places, ratio, strict=True)], ratio)
        tokens = self.token(canvas.values.to(self.token.weight.dtype))
        cells = self.place(place_embedding(ratio, canvas.values.device).to(self.place.weight.dtype))
        chosen = cells.index_select(0, inside.flatten()).view(*inside.shape, -1)
        residual = self.output(self.activation(gather_tokens(tokens, nearest) + chosen))
        known = canvas.weight.gather(1, nearest) > 0
        # A residual that is not finite times 0 would not be 0.
        return smooth + torch.where(known.unsqueeze(-1), residual.to(smooth.dtype), 0)


def place_embedding(ratio: Grid, device: torch.device | None = None) -> Float[Tensor, "R E"]:
    """Return what tells the places of a cell apart, one row per place in row-major order.

    Sines and cosines, from `PLACE_CYCLES` periods per cell down to a 64th of that, of the offset of a place from the
    centre of its cell and of its size, along each axis. The width is the same for any number of axes.

    Args:
        ratio: places of a cell per axis.
        device: where the tensor is made.
    """
    offset = grid_coordinates(ratio, (1,) * len(ratio), device)
    size = torch.cat([torch.full_like(offset[:, :1], 1 / factor) for factor in ratio], dim=1)
    return sincos_positions(2 * math.pi * PLACE_CYCLES * torch.cat([offset, size], dim=1), PLACE_DIM, theta=64.0)


def children_index(index: Int[Tensor, "B K"], grid: Grid, output_grid: Grid) -> Int[Tensor, "B K*R"]:
    """Return all output tokens inside coarse tokens: what a set on the coarse grid is on the output grid.

    Args:
        index: flat positions of coarse tokens.
        grid: tokens per axis of the coarse grid.
        output_grid: tokens per axis of the output grid, a multiple of it.

    Returns:
        Flat positions on the output grid: coarse token after coarse token in the order of `index`, row-major inside
        each; `view(B, K, R)` takes them apart.

    Raises:
        ValueError: for an output grid that is no multiple of the grid.

    >>> children_index(torch.tensor([[1]]), (1, 2), (2, 4))
    tensor([[2, 3, 6, 7]])
    """
    ratio = upsampling_ratio(grid, output_grid)
    corner = _first_child(index, grid, output_grid, ratio)
    place = torch.arange(num_tokens(ratio), device=index.device)
    return (corner.unsqueeze(-1) + _ravel(_unravel(place, ratio), output_grid)).flatten(1)


def sample_children(
    index: Int[Tensor, "B K"],
    grid: Grid,
    output_grid: Grid,
    count: int,
    seed: int | Int[Tensor, "*R"],
) -> Int[Tensor, "B K*count"]:
    """Draw output tokens inside coarse tokens, without replacement and uniformly.

    A draw is a pure function of the seed, the row (counted over all processes) and the position of the coarse token:
    these and the places of a cell are hashed and the places ordered by their hashes.

    Args:
        index: flat positions of coarse tokens; one that is named twice in a row of the batch gets the same draw.
        grid: tokens per axis of the coarse grid.
        output_grid: tokens per axis of the output grid, a multiple of it.
        count: output tokens per coarse token.
        seed: e.g. the step; a number or a tensor, which spares a compiled step another compilation; or one for each row
            (`row_seeds`), whose place then says nothing.

    Returns:
        Flat positions on the output grid: coarse token after coarse token, rising inside each; with the largest `count`
        they are those of `children_index`.

    Raises:
        ValueError: for more tokens than a coarse token covers, or an output grid that is no multiple of the grid.
    """
    ratio = upsampling_ratio(grid, output_grid)
    places = num_tokens(ratio)
    if not 1 <= count <= places:
        raise ValueError(
            f"count={count}: a token of the grid {grid} covers {places} tokens of {output_grid}; "
            f"allowed: 1 to {places}; change count or the output grid"
        )
    device = index.device
    token_seed = fold_in(row_seeds(seed, len(index), device).unsqueeze(1), index)
    order = fold_in(token_seed.unsqueeze(-1), torch.arange(places, device=device)).argsort(-1)
    chosen = order[..., :count].sort(-1).values
    corner = _first_child(index, grid, output_grid, ratio)
    return (corner.unsqueeze(-1) + _ravel(_unravel(chosen, ratio), output_grid)).flatten(1)


def _first_child(index: Tensor, grid: Grid, output_grid: Grid, ratio: Grid) -> Int[Tensor, "B K"]:
    places = _unravel(index, grid)
    return _ravel([place * factor for place, factor in zip(places, ratio, strict=True)], output_grid)


def _all_if_none(index: Tensor | None, grid: Grid, like: Tensor) -> Int[Tensor, "B K"]:
    if index is not None:
        return index
    return torch.arange(num_tokens(grid), device=like.device).expand(len(like), -1)


def _corners(
    index: Tensor, grid: Grid, output_grid: Grid, ratio: Grid, dtype: torch.dtype
) -> list[tuple[Int[Tensor, "B K"], Float[Tensor, "B K"]]]:
    """Return the flat positions of the corners around each output token with their multilinear weights."""
    corners = [(torch.zeros_like(index), torch.ones_like(index, dtype=dtype))]
    for place, size, factor in zip(_unravel(index, output_grid), grid, ratio, strict=True):
        if size == 1 or factor == 1:
            low = place // factor
            corners = [(corner * size + low, share) for corner, share in corners]
            continue
        # The place on the coarse axis in units of 1 / (2 factor), so that it is exact.
        position = (2 * place + 1 - factor).clamp(0, 2 * factor * (size - 1))
        low = position // (2 * factor)
        high = (low + 1).clamp(max=size - 1)
        part = (position % (2 * factor)).to(dtype) / (2 * factor)
        corners = [
            (corner * size + end, share * weight)
            for corner, share in corners
            for end, weight in ((low, 1 - part), (high, part))
        ]
    return corners


def _unravel(index: Tensor, grid: Grid) -> list[Tensor]:
    """Return the place along each axis of flat positions."""
    places = []
    for size in reversed(grid):
        places.append(index % size)
        index = index // size
    return places[::-1]


def _ravel(places: Sequence[Tensor], grid: Grid) -> Tensor:
    """Return the flat positions of places along each axis."""
    index = torch.zeros_like(places[0])
    for place, size in zip(places, grid, strict=True):
        index = index * size + place
    return index
