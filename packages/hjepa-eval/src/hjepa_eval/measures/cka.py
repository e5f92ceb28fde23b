"""Linear CKA: how alike two sets of features of the same samples are, whatever their widths and rotations."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from hjepa_eval.extraction.features import FeatureSet

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
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or len(x) < 2:
        raise ValueError(f"x {tuple(x.shape)} and y {tuple(y.shape)}: features [n, D] and [n, E] of the same samples")
    width, pieces = x.shape[1], max(1, len(x) * (x.shape[1] + y.shape[1]) // ELEMENTS)
    mean = torch.cat((x.sum(dim=0, dtype=torch.float64), y.sum(dim=0, dtype=torch.float64))) / len(x)
    gram = mean.new_zeros(len(mean), len(mean))
    # Some rows at a time: all samples of a large set would not fit in float64.
    for part in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
        centred = torch.cat(part, dim=1).double() - mean
        gram.addmm_(centred.T, centred)
    own = torch.linalg.matrix_norm(gram[:width, :width]) * torch.linalg.matrix_norm(gram[width:, width:])
    cross = gram[width:, :width].square().sum()
    return torch.where(own == 0, 0.0, cross / own.clamp_min(torch.finfo(torch.float64).tiny))


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
