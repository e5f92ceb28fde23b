"""How many directions features fill: RankMe, centred effective rank, α-ReQ, isotropy, spread per dimension."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hjepa_eval.probes.accuracy import check_finite


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
        ValueError: Where z is not [n, D] with at least one row, or not finite.

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
        ValueError: Where z is not [n, D] with at least one row, or not finite.

    Source:
        Roy and Vetterli 2007, "The effective rank", equations 3 to 5, on the centred matrix.
    """
    sigma = _singular_values(z, centred=True)
    sigma = torch.where(sigma > _floor(z, sigma), sigma, 0)
    p = sigma / sigma.sum().clamp_min(torch.finfo(sigma.dtype).tiny)
    return _exponential_entropy(p)


def alpha_req(z: Float[Tensor, "n D"], *, ranks: tuple[int, int] = (4, 100)) -> Float[Tensor, ""]:
    """α-ReQ: the exponent of the power law that the eigenvalues of the covariance follow.

    lambda_j ~ j^-alpha; alpha is minus the slope of log lambda_j on log j over the ranks, weighted by 1 / j

    Near 1 is the paper's mark of a good representation; far above it few directions hold the variance, far below it
    all hold the same.

    Args:
        z: Features, one row a sample; computed in float64.
        ranks: First and last rank of the fit, counted from 1; the last is lowered to the eigenvalues that there are.

    Returns:
        The exponent, a float64 scalar on the device of z; NaN where fewer than two eigenvalues above rounding lie in
        the range.

    Raises:
        ValueError: Where z is not [n, D] with at least one row, or the ranks are not in order.

    Source:
        Agrawal et al. 2022, "α-ReQ: assessing representation quality in self-supervised learning by measuring
        eigenspectrum decay" (NeurIPS), section 3; weights 1 / j as in Stringer et al. 2019 (Nature 571).
    """
    if not 1 <= ranks[0] < ranks[1]:
        raise ValueError(f"ranks={ranks}: the first must be at least 1 and below the last; (4, 100) is usual")
    sigma = _singular_values(z, centred=True)
    sigma = sigma[sigma > _floor(z, sigma)]
    last = min(ranks[1], len(sigma))
    if last <= ranks[0]:
        return sigma.new_tensor(torch.nan)
    x = torch.arange(ranks[0], last + 1, dtype=sigma.dtype, device=sigma.device)
    y, weight = 2 * sigma[ranks[0] - 1 : last].log(), 1 / x
    x = x.log()
    x, y = x - (weight * x).sum() / weight.sum(), y - (weight * y).sum() / weight.sum()
    return -(weight * x * y).sum() / (weight * x * x).sum()


def isotropy(z: Float[Tensor, "n D"]) -> Float[Tensor, ""]:
    """IsoScore: how evenly the variance lies over all D directions, 0 on a line and 1 where all have the same.

    iota = (P - 1) / (D - 1),   P = (sum lambda)^2 / sum lambda^2  the participation ratio of the covariance

    Args:
        z: Features, one row a sample, D >= 2; computed in float64.

    Returns:
        The score in [0, 1], a float64 scalar on the device of z; 0 for features without variance.

    Raises:
        ValueError: Where z is not [n, D] with at least one row and D >= 2.

    Source:
        Rudman et al. 2022 (arXiv 2108.07344), definition of IsoScore: its steps 3 to 8 reduce to this.

    Example:
        >>> round(isotropy(torch.cat((torch.eye(4), -torch.eye(4)))).item(), 6)
        1.0
    """
    if z.ndim == 2 and z.shape[1] < 2:
        raise ValueError(f"z of shape {tuple(z.shape)}: isotropy needs at least two dimensions")
    sigma = _singular_values(z, centred=True)
    eigenvalues = torch.where(sigma > _floor(z, sigma), sigma, 0).square()
    total = eigenvalues.sum().square()
    participation = torch.where(total > 0, total / eigenvalues.square().sum().clamp_min(1e-300), 1.0)
    return (participation - 1) / (z.shape[1] - 1)


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


def _floor(z: Tensor, sigma: Tensor) -> Tensor:
    """What rounding leaves of a direction that is constant; it is no direction."""
    norm: Tensor = torch.linalg.vector_norm(z.double())
    return norm * (torch.finfo(sigma.dtype).eps * max(z.shape))


def _singular_values(z: Tensor, *, centred: bool) -> Tensor:
    if z.ndim != 2 or z.shape[0] < 1 or z.shape[1] < 1:
        raise ValueError(f"z of shape {tuple(z.shape)}: the spectrum needs features [n, D] of at least one sample")
    values = z.detach().double()
    check_finite(values, "z")
    if centred:
        values = values - values.mean(dim=0)
    # The smaller Gram matrix is faster than a decomposition of the samples. What lies below a millionth or so of the
    # largest is rounding there, and counts as nothing.
    gram = values @ values.T if len(values) < values.shape[1] else values.T @ values
    squares = torch.linalg.eigvalsh(gram).flip(0)
    rounding = max(values.shape) * torch.finfo(squares.dtype).eps * squares[0]
    return torch.where(squares > rounding, squares, 0).sqrt()
