"""Has a representation collapsed? A verdict with its reasons."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from jaxtyping import Float
from torch import Tensor

from hjepa_eval.extraction.features import FeatureSet
from hjepa_eval.measures.spectrum import effective_rank
from hjepa_eval.measures.sphere import mean_cosine


class Verdict(StrEnum):
    """State of a representation."""

    healthy = "healthy"
    """Nothing is out of the ordinary."""
    poor = "poor"
    """Much of the width is unused, or features point much the same way: look at it."""
    collapsed = "collapsed"
    """Features hardly depend on the image."""


@dataclass(kw_only=True, slots=True)
class CollapseConfig:
    """Where a collapse begins. Each pair is (poor, collapsed).

    Attributes:
        relative_spread: Root mean square of the standard deviations, as a share of the root mean square of the
            features; below is worse.
        rank_share: Effective rank (centred), less the one direction that there always is, as a share of min(n - 1, D)
            less one; below is worse.
        dead_share: Share of the dimensions whose standard deviation is below 1e-3 of the mean one; above is worse.
        cosine: Mean cosine of different samples; above is worse.
    """

    relative_spread: tuple[float, float] = (0.1, 0.01)
    rank_share: tuple[float, float] = (0.1, 0.02)
    dead_share: tuple[float, float] = (0.1, 0.9)
    cosine: tuple[float, float] = (0.95, 0.9999)

    def __post_init__(self) -> None:
        for name, down in (("relative_spread", True), ("rank_share", True), ("dead_share", False), ("cosine", False)):
            poor, collapsed = value = tuple(getattr(self, name))
            setattr(self, name, value)
            if not (0 < collapsed < poor <= 1 if down else 0 < poor < collapsed <= 1):
                order = "collapsed below poor" if down else "poor below collapsed"
                raise ValueError(f"{name}={value}: (poor, collapsed), both in (0, 1], {order}; the default is a start")


@dataclass(kw_only=True, slots=True, frozen=True)
class CollapseReport:
    """A verdict and what it rests on.

    Attributes:
        verdict: healthy, poor or collapsed.
        reasons: One line for each number that is out of bounds, worst first; empty where healthy.
        numbers: relative_spread, rank_share, dead_share, cosine.
        n: Samples it is of.
    """

    verdict: Verdict
    reasons: tuple[str, ...]
    numbers: dict[str, float]
    n: int


def judge_collapse(z: Float[Tensor, "n D"], config: CollapseConfig | None = None) -> CollapseReport:
    """Judge features by their spread, effective rank, dead dimensions and mean cosine.

    A loss says nothing about a collapse: a constant encoder is perfectly predictable.

    Args:
        z: Features of different images, one row a sample, at least two (some hundreds tell more).
        config: The bounds.

    Returns:
        The verdict with its reasons.

    Raises:
        ValueError: Where z is not [n, D] of at least two samples.
    """
    if z.ndim != 2 or len(z) < 2:
        raise ValueError(f"z of shape {tuple(z.shape)}: a verdict needs features [n, D] of at least two samples")
    config = CollapseConfig() if config is None else config
    values = z.detach().double()
    deviation = values.std(dim=0)
    scale, mean = float(values.square().mean().sqrt()), float(deviation.mean())
    most = min(len(values) - 1, values.shape[1])
    numbers = {
        "relative_spread": float(deviation.square().mean().sqrt()) / scale if scale > 0 else 0.0,
        # Of one direction at most nothing can be missing.
        "rank_share": (float(effective_rank(values)) - 1) / (most - 1) if most > 1 else 1.0,
        "dead_share": float((deviation < 1e-3 * mean).double().mean()) if mean > 0 else 1.0,
        "cosine": float(mean_cosine(values)) if scale > 0 else 1.0,
    }
    found: list[tuple[Verdict, str]] = []
    for name, what, above in (
        ("relative_spread", "features hardly differ between images: spread / scale", False),
        ("rank_share", "few directions are used: (effective rank - 1) / (largest possible - 1)", False),
        ("dead_share", "dimensions are constant: share of them", True),
        ("cosine", "features point the same way: mean cosine", True),
    ):
        poor, collapsed = getattr(config, name)
        value = numbers[name] if above else -numbers[name]
        bounds = (poor, collapsed) if above else (-poor, -collapsed)
        if value > bounds[0]:
            verdict = Verdict.collapsed if value > bounds[1] else Verdict.poor
            limit = collapsed if verdict is Verdict.collapsed else poor
            found.append((verdict, f"{what} is {numbers[name]:.4g}, {'above' if above else 'below'} {limit:g}"))
    found.sort(key=lambda one: one[0] is not Verdict.collapsed)
    fatal = {verdict for verdict, _ in found}
    verdict = Verdict.collapsed if Verdict.collapsed in fatal else Verdict.poor if found else Verdict.healthy
    return CollapseReport(verdict=verdict, reasons=tuple(reason for _, reason in found), numbers=numbers, n=len(values))


def judge_levels(
    sets: Mapping[str, FeatureSet], config: CollapseConfig | None = None, *, samples: int = 25_600
) -> dict[str, CollapseReport]:
    """A verdict for each level.

    Args:
        sets: Features by level.
        config: The bounds.
        samples: How many of the samples are taken, at most, drawn by a fixed seed.

    Returns:
        The verdicts by level.
    """
    return {level: judge_collapse(one.some(samples).values, config) for level, one in sets.items()}
