"""A probe for each known factor: accuracy for classes, R^2 for numbers."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hjepa_eval.probes.accuracy import check_finite, check_known, check_widths, split, top1
from hjepa_eval.probes.logistic import LogisticProbe, LogisticProbeConfig, moments
from hjepa_eval.results.interval import Interval, bootstrap

Factors = Mapping[str, Tensor]
PENALTIES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)


@dataclass(kw_only=True, slots=True, frozen=True)
class FactorScore:
    """How well a factor can be read off features by a linear map.

    Attributes:
        factor: Its name.
        kind: "accuracy" for a factor of integers (classes), "r2" for one of floats.
        interval: The score on the test samples with its bootstrap interval.
        chance: Score of a probe that sees no features: share of the commonest training class, or 0.
    """

    factor: str
    kind: str
    interval: Interval
    chance: float


def factor_probe(
    train: Float[Tensor, "n D"],
    train_factors: Factors,
    test: Float[Tensor, "m D"],
    test_factors: Factors,
    *,
    probe: LogisticProbeConfig | None = None,
    seed: int = 0,
) -> list[FactorScore]:
    """Probe every factor: logistic regression for integers, ridge regression for floats.

    R^2 = 1 - sum (y - y^)^2 / sum (y - mean of the training y)^2,  over all columns of the factor

    Args:
        train: Training features.
        train_factors: Values of each factor: integers [n] (classes, 0 and up) or floats [n] or [n, c] (position).
        test: Test features.
        test_factors: The same factors of the test samples.
        probe: How logistic regressions are fitted.
        seed: Of the split that chooses the ridge penalty, and of the bootstrap.

    Returns:
        A score for each factor.

    Raises:
        ValueError: Where a factor lacks values or is constant, a class is unknown, or something is not finite.
    """
    check_widths(train, test)
    check_finite(test, "test")
    scores = []
    for name, values in train_factors.items():
        if name not in test_factors or len(values) != len(train) or len(test_factors[name]) != len(test):
            raise ValueError(f"factor {name!r}: give a value for each training and each test sample")
        truth = test_factors[name]
        if values.is_floating_point():
            y, test_y = (v.detach()[:, None].flatten(1).double().to(train.device) for v in (values, truth))
            check_varies(y, test_y, name)
            error = (test_y - ridge(train, y, test, seed=seed)).square().sum(dim=1)
            total = (test_y - y.mean(dim=0)).square().sum(dim=1)
            interval = bootstrap(
                torch.stack((error, total), dim=1), lambda mean: 1 - mean[:, 0] / mean[:, 1], seed=seed
            )
            scores.append(FactorScore(factor=name, kind="r2", interval=interval, chance=0.0))
        else:
            labels, test_labels = (v.long().to(train.device) for v in (values, truth))
            for each in (labels, test_labels):
                check_known(each, f"factor {name!r}")
            check_varies(labels, test_labels, name)
            right = LogisticProbe(probe).fit(train, labels).predict(test) == test_labels
            commonest = labels.bincount().argmax()
            chance = top1(commonest.expand(len(test_labels)), test_labels)
            interval = bootstrap(right, seed=seed)
            scores.append(FactorScore(factor=name, kind="accuracy", interval=interval, chance=chance))
    return scores


def check_varies(values: Tensor, test_values: Tensor, name: str) -> None:
    """Raise a ValueError for a factor that is not finite, or that is constant over either set of samples."""
    for each, samples in ((values, "training"), (test_values, "test")):
        check_finite(each, f"factor {name!r}")
        if bool((each == each[:1]).all()):
            raise ValueError(f"factor {name!r}: it does not vary over the {samples} samples; leave it out")


def ridge(
    train: Float[Tensor, "n D"], y: Float[Tensor, "n c"], test: Float[Tensor, "m D"], *, seed: int = 0
) -> Float[Tensor, "m c"]:
    """Ridge regression on standardised features, its penalty chosen on a fifth of the training samples.

    Args:
        train: Training features.
        y: What is predicted.
        test: Test features.
        seed: Of the split.

    Returns:
        Predictions, float64.
    """
    mean, scale = moments(train)
    x, test_x = ((part.detach().double() - mean) / scale for part in (train, test))
    kept, held = (part.to(x.device) for part in split(len(x), 0.2, seed))
    errors = [float((y[held] - _ridge(x[kept], y[kept], x[held], p)).square().sum()) for p in PENALTIES]
    return _ridge(x, y, test_x, PENALTIES[errors.index(min(errors))])


def _ridge(x: Tensor, y: Tensor, test: Tensor, penalty: float) -> Tensor:
    centre, offset = x.mean(dim=0), y.mean(dim=0)
    x = x - centre
    gram = x.T @ x / len(x)
    gram.diagonal().add_(penalty)
    weight: Tensor = torch.linalg.solve(gram, x.T @ (y - offset) / len(x))
    return (test - centre) @ weight + offset
