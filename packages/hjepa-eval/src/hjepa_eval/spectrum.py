"""How many directions features fill: RankMe, the centred effective rank, and the spread per dimension."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


def rankme(z: Float[Tensor, "n D"], eps: float = 1e-7) -> Float[Tensor, ""]:
    """RankMe: the exponential of the entropy of the normalised singular values of *uncentred* features.

    p_i = sigma_i / sum(sigma) + eps,   RankMe = exp(-sum_i p_i log p_i)

    It lies between 1 and min(n, D). A constant offset of all features lowers it (see effective_rank), and so does a
    small n: compare within one method and one n only. The paper takes n = 25,600.

    Args:
        z: Features, one row a sample; computed in float64.
        eps: Added to each p.

    Returns:
        The score, a float64 scalar on the device of z. Features that are all zero score 1.

    Raises:
        ValueError: Where z is not [n, D] with at least one row.

    Source:
        Garrido et al. 2023 (arXiv 2210.02885), equation 3.

    Example:
        >>> round(rankme(torch.eye(8)).item(), 4)
        8.0
    """
    sigma = _singular_values(z, centred=False)
    p = sigma / sigma.sum().clamp_min(torch.finfo(sigma.dtype).tiny) + eps
    return _exponential_entropy(p)


def effective_rank(z: Float[Tensor, "n D"]) -> Float[Tensor, ""]:
    """Effective rank of *centred* features: the same entropy without offset, so that a constant does not matter.

    p_i = sigma_i / sum(sigma) of z - mean(z),   rank = exp(-sum_i p_i log p_i),   0 log 0 = 0

    Isotropic features of width 384 with an offset of ten times their deviation have a RankMe near 98 and an effective
    rank near 383: the two are different numbers, reported by their own names.

    Args:
        z: Features, one row a sample; computed in float64.

    Returns:
        The rank, between 1 and min(n - 1, D), a float64 scalar on the device of z; 1 for features without variance.

    Raises:
        ValueError: Where z is not [n, D] with at least one row.

    Source:
        Roy and Vetterli 2007, "The effective rank", equations 3 to 5, on the centred matrix.
    """
    sigma = _singular_values(z, centred=True)
    # What rounding leaves of a direction that is constant is no direction.
    floor = torch.finfo(sigma.dtype).eps * max(z.shape) * torch.linalg.vector_norm(z.double())
    sigma = torch.where(sigma > floor, sigma, 0)
    p = sigma / sigma.sum().clamp_min(torch.finfo(sigma.dtype).tiny)
    return _exponential_entropy(p)


@dataclass(kw_only=True, slots=True, frozen=True)
class Spread:
    """Standard deviation of each dimension over the samples, summarised over the dimensions (units of the features).

    Attributes:
        mean: Mean over the dimensions.
        minimum: The smallest.
        median: The median.
        maximum: The largest.
    """

    mean: float
    minimum: float
    median: float
    maximum: float


def spread(z: Float[Tensor, "n D"]) -> Spread:
    """Summarise the standard deviation (n - 1 in the denominator) of each dimension of features.

    Args:
        z: Features, one row a sample, at least two.

    Returns:
        Mean, minimum, median and maximum over dimensions; all near 0 is a collapse.

    Raises:
        ValueError: Where z is not [n, D] with at least two rows.
    """
    if z.ndim != 2 or z.shape[0] < 2 or z.shape[1] < 1:
        raise ValueError(f"z of shape {tuple(z.shape)}: a spread needs features [n, D] of at least two samples")
    deviation = z.double().std(dim=0)
    mean, low, middle, high = torch.stack(
        (deviation.mean(), deviation.min(), deviation.median(), deviation.max())
    ).tolist()
    return Spread(mean=mean, minimum=low, median=middle, maximum=high)


def _exponential_entropy(p: Tensor) -> Tensor:
    entropy: Tensor = torch.special.entr(p).sum()
    return entropy.exp()


def _singular_values(z: Tensor, *, centred: bool) -> Tensor:
    if z.ndim != 2 or z.shape[0] < 1 or z.shape[1] < 1:
        raise ValueError(f"z of shape {tuple(z.shape)}: the spectrum needs features [n, D] of at least one sample")
    values = z.detach().double()
    if centred:
        values = values - values.mean(dim=0)
    singular: Tensor = torch.linalg.svdvals(values)
    return singular
