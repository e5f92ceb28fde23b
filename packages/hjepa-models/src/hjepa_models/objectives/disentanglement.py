"""Disentanglement: the channels of one level should not be linear copies of those of another."""

import itertools
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from hjepa_models.canvas import Canvas
from hjepa_models.distributed import all_reduce_mean
from hjepa_models.grid import Grid, coarsen, num_tokens
from hjepa_models.pooling import pool_canvas


def disentanglement(levels: Sequence[Canvas], eps: float = 1e-4) -> Float[Tensor, ""]:
    r"""Mean squared correlation between the channels of different levels, averaged over pairs of levels.

    $$\frac{1}{D_a D_b} \sum_{ij} \rho_{ij}^2, \qquad
    \rho_{ij} = \frac{\mathrm{Cov}(a_i, b_j)}{\sqrt{(\mathrm{Var}\,a_i + \epsilon)(\mathrm{Var}\,b_j + \epsilon)}}$$

    The tokens of all levels are first averaged on the coarsest level's grid. The rows are the cells that every level
    knows, of all images of all processes, weighted by the coarsest level's weight. Levels may differ in width.

    The result lies in [0, 1]. It is 0 where no channel of one level is correlated with one of the other; n independent
    rows leave a floor of about 1/n. Equal levels of D channels that are uncorrelated with one another give 1/D, and 1
    is reached where every channel of both levels is one and the same up to place and scale. A level that has collapsed
    to a constant gives 0: something else must keep the levels from collapsing.

    Args:
        levels: canvases over the same images whose grids follow from one another by halving with ceil, in any order.
        eps: keeps the correlation of a channel without variance, and its gradient, finite; compared with a variance.

    Returns:
        The penalty.

    Raises:
        ValueError: for fewer than two levels, or grids that do not follow from one another.
    """
    if len(levels) < 2:
        raise ValueError(f"levels: {len(levels)} given, nothing to compare; allowed: 2 or more; give more levels")
    sizes = [num_tokens(level.grid) for level in levels]
    coarsest = levels[sizes.index(min(sizes))]
    pooled = [_pool_to(level, coarsest.grid) for level in levels]
    with torch.autocast(coarsest.values.device.type, enabled=False):
        weight = coarsest.weight.to(pooled[0].values.dtype).flatten()
        for level in pooled:
            weight = weight * (level.weight.flatten() > 0)
        widths = [level.values.shape[-1] for level in pooled]
        channels = torch.cat([level.values.flatten(0, 1) for level in pooled], dim=1)
        sums = all_reduce_mean(torch.cat([weight.sum().unsqueeze(0), weight @ channels]))
        total = torch.where(sums[0] > 0, sums[0], 1)
        centred = channels - sums[1:] / total
        apart = torch.split(centred, widths, dim=1)
        pairs = list(itertools.combinations(range(len(levels)), 2))
        products = [((weight.unsqueeze(-1) * apart[a]).T @ apart[b]).flatten() for a, b in pairs]
        second = all_reduce_mean(torch.cat([weight @ centred.square(), *products])) / total
        variance, *covariances = torch.split(second, [sum(widths), *(len(product) for product in products)])
        scale = torch.split((variance + eps).rsqrt(), widths)
        terms = [
            (covariance.view(widths[a], widths[b]) * torch.outer(scale[a], scale[b])).square().mean()
            for covariance, (a, b) in zip(covariances, pairs, strict=True)
        ]
        return torch.stack(terms).mean()


def _pool_to(canvas: Canvas, grid: Grid) -> Canvas:
    """Average a canvas on a coarser grid, in float32 at least."""
    values = canvas.values.to(torch.promote_types(canvas.values.dtype, torch.float32))
    for level in range(max(canvas.grid).bit_length() + 1):
        if coarsen(canvas.grid, level) == grid:
            return pool_canvas(Canvas(values, canvas.weight, canvas.grid), level)
    raise ValueError(
        f"levels: the grid {canvas.grid} is not halved to {grid} by any number of steps; "
        f"allowed: levels of one pyramid, e.g. (14, 14), (7, 7), (4, 4); give canvases of one pyramid"
    )
