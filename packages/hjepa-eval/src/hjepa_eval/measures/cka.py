"""Linear CKA: how alike two sets of features of the same samples are, whatever their widths and rotations."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from hjepa_eval.extraction.features import FeatureSet
from hjepa_eval.results.interval import Interval, group_of_each, of_parts

ELEMENTS = 2**24  # numbers that are centred at once: 128 MiB of float64


def linear_cka(x: Float[Tensor, "n D"], y: Float[Tensor, "n E"]) -> Float[Tensor, ""]:
    """Centred kernel alignment with linear kernels: 1 for features equal up to rotation and scale, 0 for unrelated.

    CKA = |Y^T X|_F^2 / (|X^T X|_F |Y^T Y|_F),   X and Y centred

    Args:
        x: Features; computed in float64.
        y: Features of the same samples in the same order.

    Returns:
        A float64 scalar in [0, 1] on the device of x; 0 where either does not vary, NaN where one is not finite. A
        small n raises it: unrelated features of widths D and E have about sqrt(D E) / n.

    Raises:
        ValueError: Where the numbers of samples differ or are below two.

    Source:
        Kornblith et al. 2019 (arXiv 1905.00414), section 3: CKA with linear kernels.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]])
        >>> round(linear_cka(x, 5 * x.flip(1) + 1).item(), 6)
        1.0
    """
    return _alignment(_gram(x, y, _mean(x, y))[0], x.shape[1])


def cka_interval(x: Float[Tensor, "n D"], y: Float[Tensor, "n E"], *, groups: int = 10) -> Interval:
    """Linear CKA with its interval, for the price of one: what jackknife gives, from one pass over the samples.

    Args:
        x: Features; computed in float64.
        y: Features of the same samples in the same order.
        groups: Groups of the jackknife; (D + E)^2 numbers are held for each.

    Returns:
        linear_cka of all samples with its interval.

    Raises:
        ValueError: Where the numbers of samples differ, with fewer than two groups, or fewer samples than two a group.
    """
    mean = _mean(x, y)
    if not 2 <= groups <= len(x) // 2:
        raise ValueError(f"groups={groups}: of {len(x)} samples; allowed: 2 up to half as many as samples")
    group_of = group_of_each(len(x), groups).to(x.device)
    found = [_gram(x[group_of == group], y[group_of == group], mean) for group in range(groups)]
    whole = torch.stack([gram for gram, _ in found]).sum(dim=0)
    parts = []
    for group, (gram, total) in enumerate(found):
        left = int((group_of != group).sum())
        # Without the group the mean is another one.
        parts.append(float(_alignment(whole - gram - torch.outer(total, total) / left, x.shape[1])))
    return of_parts(float(_alignment(whole, x.shape[1])), parts, len(x), (0.0, 1.0))


def cka_matrix(sets: Mapping[str, FeatureSet]) -> tuple[list[str], Float[Tensor, "L L"]]:
    """Linear CKA of every pair of levels.

    Args:
        sets: Features of the same samples by level.

    Returns:
        The names of the levels, and the matrix: symmetric, 1 on the diagonal.
    """
    names = list(sets)
    matrix = torch.eye(len(names), dtype=torch.float64)
    for i, first in enumerate(names):
        for j in range(i):
            matrix[i, j] = matrix[j, i] = linear_cka(sets[first].values, sets[names[j]].values)
    return names, matrix


def _mean(x: Tensor, y: Tensor) -> Float[Tensor, " D+E"]:
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or len(x) < 2:
        raise ValueError(f"x {tuple(x.shape)} and y {tuple(y.shape)}: features [n, D] and [n, E] of the same samples")
    return torch.cat([part.detach().sum(dim=0, dtype=torch.float64) for part in (x, y)]) / len(x)


def _gram(x: Tensor, y: Tensor, mean: Tensor) -> tuple[Float[Tensor, "D+E D+E"], Float[Tensor, " D+E"]]:
    """Products of all dimensions of [x, y] - mean, and their sums over the samples."""
    gram, total = mean.new_zeros(len(mean), len(mean)), torch.zeros_like(mean)
    pieces = max(1, len(x) * len(mean) // ELEMENTS)
    # Some rows at a time: all samples of a large set would not fit in float64.
    for part in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
        centred = torch.cat(part, dim=1).detach().double() - mean
        gram.addmm_(centred.T, centred)
        total += centred.sum(dim=0)
    return gram, total


def _alignment(gram: Float[Tensor, "D+E D+E"], width: int) -> Float[Tensor, ""]:
    own = torch.linalg.matrix_norm(gram[:width, :width]) * torch.linalg.matrix_norm(gram[width:, width:])
    cross = gram[width:, :width].square().sum()
    return torch.where(own == 0, 0.0, cross / own.clamp_min(torch.finfo(torch.float64).tiny))
