"""Intervals of a measured number: by bootstrap over samples, over draws or seeds, by a jackknife over groups."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

# 97.5 % quantiles of Student's t for 1 to 30 degrees of freedom; a series in 1 / freedom beyond.
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
ELEMENTS = 2**22  # draws held at once
ANYWHERE = (-math.inf, math.inf)


@dataclass(kw_only=True, slots=True, frozen=True)
class Interval:
    """A number and what surrounds it with 95 % confidence.

    Attributes:
        value: The number.
        low: Lower end.
        high: Upper end.
        method: "bootstrap" (over test samples), "seeds" or "draws" (Student's t over repetitions), "jackknife" (over
            ten groups of samples), or "none" where there are too few samples, or nothing to draw; both ends are
            NaN then.
        n: Samples or repetitions that the interval is over.
    """

    value: float
    low: float
    high: float
    method: str
    n: int

    @classmethod
    def without_ends(cls, value: float, n: int) -> "Interval":
        """A number of which nobody can say how far it would vary."""
        return cls(value=value, low=math.nan, high=math.nan, method="none", n=n)

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap(
    samples: Tensor,
    statistic: Callable[[Tensor], Tensor] | None = None,
    *,
    draws: int = 1000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap over samples: each draw takes n of the n samples with replacement.

    Draws of booleans that are all alike do not vary: the interval of their share is the exact one, [0, 1 - 0.025^(1/n)]
    or [0.025^(1/n), 1].

    Args:
        samples: A number or a boolean (whether it was classified rightly) for each sample [n], or several [n, ...],
            such as its confusion matrix.
        statistic: Maps the means of r draws [r, ...] to r numbers; None: the mean itself.
        draws: Number of draws.
        seed: Of the draws.

    Returns:
        The statistic of the samples with the 2.5 % and 97.5 % quantiles of its draws; without ends where it is not
        defined for some draw.

    Raises:
        ValueError: Where there is no sample or no draw.

    Source:
        Efron and Tibshirani 1993, "An introduction to the bootstrap", section 13.3; shares of 0 and 1: Clopper and
        Pearson 1934 (Biometrika 26), "The use of confidence or fiducial limits".
    """
    drawn, whole = bootstrap_means(samples, draws=draws, seed=seed), samples.detach().cpu().double().mean(0, True)
    if statistic is not None:
        drawn, whole = statistic(drawn), statistic(whole)
    low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    value, end = float(whole[0]), 0.025 ** (1 / len(samples))
    if samples.dtype is torch.bool and statistic is None and value in {0.0, 1.0}:
        low, high = (end, 1.0) if value else (0.0, 1 - end)
    if math.isnan(low):
        return Interval.without_ends(value, len(samples))
    return Interval(value=value, low=low, high=high, method="bootstrap", n=len(samples))


def bootstrap_means(samples: Tensor, *, draws: int = 1000, seed: int = 0) -> Tensor:
    """The means of a bootstrap's draws [r, ...], for samples [n, ...]; bootstrap says more."""
    if not len(samples):
        raise ValueError("samples: there are none to draw from; check that the test set has labels")
    if draws < 1:
        raise ValueError(f"draws={draws}: at least 1; 1000 is usual")
    rows = samples.detach().cpu().double().reshape(len(samples), -1)
    generator = torch.Generator().manual_seed(seed)
    means = []
    for first in range(0, draws, max(1, ELEMENTS // len(rows))):
        count = min(draws - first, max(1, ELEMENTS // len(rows)))
        index = torch.randint(0, len(rows), (count, len(rows)), generator=generator)
        times = torch.zeros(count, len(rows), dtype=torch.float64).scatter_add_(
            1, index, torch.ones(1, 1, dtype=torch.float64).expand_as(index)
        )
        means.append(times @ rows / len(rows))
    return torch.cat(means).view(-1, *samples.shape[1:])


def interval_of_mean(values: Sequence[float], method: str = "seeds") -> Interval:
    """Mean of repetitions with Student's t interval: mean ± t * s / sqrt(r).

    Args:
        values: The number of each repetition, at least two.
        method: What was repeated: "seeds" or "draws".

    Returns:
        The mean and its interval.

    Raises:
        ValueError: With fewer than two.
    """
    if len(values) < 2:
        raise ValueError(f"values={tuple(values)}: an interval needs at least two repetitions")
    mean = statistics.fmean(values)
    deviation = (sum((value - mean) ** 2 for value in values) / (len(values) - 1)) ** 0.5
    half = _quantile(len(values) - 1) * deviation / len(values) ** 0.5
    return Interval(value=mean, low=mean - half, high=mean + half, method=method, n=len(values))


def jackknife(
    z: Tensor,
    statistic: Callable[[Tensor], Tensor | float],
    *,
    groups: int = 10,
    within: tuple[float, float] = ANYWHERE,
) -> Interval:
    """Interval of a number that needs many samples at once, like a rank: leave out one group of samples at a time.

    se^2 = (g - 1) / g * sum_i (theta_i - mean(theta))^2,   interval = theta ± t_(g-1) * se

    A bootstrap would repeat samples, and a repeated sample lowers a rank. Groups are those of group_of_each.

    Args:
        z: Features [n, ...], one row a sample.
        statistic: Maps features to a number; called g + 1 times.
        groups: g.
        within: Least and largest number that there can be; the interval ends there.

    Returns:
        The number of all samples with its interval.

    Raises:
        ValueError: With fewer than two groups, or fewer samples than 2 g.

    Source:
        Efron and Tibshirani 1993, section 11.5 (jackknife of groups).
    """
    if not 2 <= groups <= len(z) // 2:
        raise ValueError(f"groups={groups}: of {len(z)} samples; allowed: 2 up to half as many as samples")
    group = group_of_each(len(z), groups).to(z.device)
    value = float(statistic(z))
    return of_parts(value, [float(statistic(z[group != number])) for number in range(groups)], len(z), within)


def group_of_each(n: int, groups: int) -> Int[Tensor, " n"]:
    """The jackknife's group of each of n samples, drawn with a fixed seed: every n-th sample may be of one class."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(0)) % groups


def of_parts(value: float, parts: Sequence[float], n: int, within: tuple[float, float] = ANYWHERE) -> Interval:
    """The jackknife's interval of a number, from what it is without each group of the n samples."""
    groups, mean = len(parts), statistics.fmean(parts)
    error = ((groups - 1) / groups * sum((part - mean) ** 2 for part in parts)) ** 0.5
    half = _quantile(groups - 1) * error
    # Rounding may lead a number itself beyond its range.
    low, high = min(max(value - half, within[0]), value), max(min(value + half, within[1]), value)
    return Interval(value=value, low=low, high=high, method="jackknife", n=n)


def _quantile(freedom: int) -> float:
    if freedom <= len(_T):
        return _T[freedom - 1]
    z = statistics.NormalDist().inv_cdf(0.975)
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
