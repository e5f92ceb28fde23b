"""Features on the unit sphere: alignment of views, uniformity over the sphere."""

from jaxtyping import Float
from torch import Tensor

from hjepa_eval.probes.rows import unit

ELEMENTS = 2**24  # pairs held at once: 128 MiB of float64


def alignment(first: Float[Tensor, "n D"], second: Float[Tensor, "n D"], *, alpha: float = 2.0) -> Float[Tensor, ""]:
    """Mean distance of two views of an image on the unit sphere, to the power of alpha; 0 is perfect.

    mean_i |f(x_i) / |f(x_i)| - f(y_i) / |f(y_i)||^alpha

    Args:
        first: Features of one view of each image; computed in float64.
        second: Features of another view.
        alpha: The power.

    Returns:
        A float64 scalar on the device of the features.

    Raises:
        ValueError: Where the shapes are not [n, D] of one size.

    Source:
        Wang and Isola 2020 (arXiv 2005.10242), section 4.1.1.
    """
    if first.ndim != 2 or first.shape != second.shape or not len(first):
        raise ValueError(
            f"first {tuple(first.shape)} and second {tuple(second.shape)}: both must be [n, D] of one size"
        )
    distance = (unit(first) - unit(second)).norm(dim=1)
    mean: Tensor = distance.pow(alpha).mean()
    return mean


def uniformity(z: Float[Tensor, "n D"], *, t: float = 2.0) -> Float[Tensor, ""]:
    """Logarithm of the mean Gaussian potential of all pairs on the unit sphere; lower is more uniform, 0 a collapse.

    log mean_{i < j} exp(-t |u_i - u_j|^2),   u = z / |z|, 0 for a row of zeros

    Args:
        z: Features; computed in float64, some of the pairs at a time.
        t: Width of the potential.

    Returns:
        A float64 scalar on the device of z.

    Raises:
        ValueError: Where z is not [n, D] of at least two samples.

    Source:
        Wang and Isola 2020 (arXiv 2005.10242), section 4.1.2.
    """
    if z.ndim != 2 or len(z) < 2:
        raise ValueError(f"z of shape {tuple(z.shape)}: uniformity needs features [n, D] of at least two samples")
    points = unit(z.detach())
    half = points.square().sum(dim=1) / 2
    total, step = points.new_zeros(()), max(1, ELEMENTS // len(points))
    for first in range(0, len(points), step):
        # |u_i - u_j|^2 = |u_i|^2 + |u_j|^2 - 2 u_i u_j
        rows = slice(first, first + step)
        product = (points[rows] @ points[first:].T).sub_(half[rows, None]).sub_(half[first:])
        potential = product.clamp_(max=0).mul_(2 * t).exp_()
        total += potential.triu_(diagonal=1).sum()
    return (total / (len(points) * (len(points) - 1) / 2)).log()


def mean_cosine(z: Float[Tensor, "n D"]) -> Float[Tensor, ""]:
    """Mean cosine of all pairs of different samples; near 1, all features point the same way.

    (|sum_i u_i|^2 - n) / (n (n - 1)),   u = z / |z|

    Args:
        z: Features; computed in float64.

    Returns:
        A float64 scalar on the device of z.

    Raises:
        ValueError: Where z is not [n, D] of at least two samples.

    Example:
        >>> import torch
        >>> round(mean_cosine(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])).item(), 4)
        0.3333
    """
    if z.ndim != 2 or len(z) < 2:
        raise ValueError(f"z of shape {tuple(z.shape)}: a mean cosine needs features [n, D] of at least two samples")
    points = unit(z)
    n = len(points)
    return (points.sum(dim=0).square().sum() - points.square().sum()) / (n * (n - 1))
