"""How many dimensions hold what is known: accuracy behind a bottleneck of 2, 4, 8, ... principal components."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hjepa_eval.probes.accuracy import check_finite, check_known, check_widths
from hjepa_eval.probes.logistic import LogisticProbe, LogisticProbeConfig
from hjepa_eval.results.interval import Interval, bootstrap


@dataclass(kw_only=True, slots=True, frozen=True)
class BottleneckScore:
    """Accuracy behind a bottleneck.

    Attributes:
        width: Principal components that are kept.
        variance: Share of the training variance that they hold.
        interval: Top-1 accuracy on the test samples with its bootstrap interval.
    """

    width: int
    variance: float
    interval: Interval


def bottleneck_sweep(
    train: Float[Tensor, "n D"],
    train_labels: Int[Tensor, " n"],
    test: Float[Tensor, "m D"],
    test_labels: Int[Tensor, " m"],
    *,
    widths: Sequence[int] = (),
    probe: LogisticProbeConfig | None = None,
) -> list[BottleneckScore]:
    """Fit a logistic probe on the leading principal components of the training features, for each width.

    Args:
        train: Training features.
        train_labels: Their classes, 0 and up.
        test: Test features.
        test_labels: Their classes.
        widths: Widths of the bottleneck; none: powers of two from 2, and D.
        probe: How the probes are fitted.

    Returns:
        A score for each width, narrowest first.

    Raises:
        ValueError: Where a width is not in [1, D], a class is unknown or features are not finite.
    """
    check_widths(train, test)
    check_finite(train)
    check_finite(test, "test")
    check_known(test_labels, "test_labels")
    width = train.shape[1]
    wanted = sorted(set(widths)) or [*(2**i for i in range(1, 32) if 2**i < width), width]
    if wanted[0] < 1 or wanted[-1] > width:
        raise ValueError(f"widths={tuple(wanted)}: each from 1 to the {width} dimensions of the features")
    x, test_x = (part.detach().double() for part in (train, test))
    centre = x.mean(dim=0)
    x, test_x = x - centre, test_x - centre
    # eigh sorts upwards.
    variance, directions = torch.linalg.eigh(x.T @ x / len(x))
    variance, directions = variance.flip(0).clamp_min(0), directions.flip(1)
    # In a direction without variance float32 leaves rounding noise, which a standardised probe would make loud.
    told = variance.sqrt() > 1e-6 * (x + centre).square().mean().sqrt()
    x, test_x = ((part @ directions * told).float() for part in (x, test_x))
    classes = int(torch.maximum(train_labels.max(), test_labels.max())) + 1
    scores = []
    for kept in wanted:
        fitted = LogisticProbe(probe).fit(x[:, :kept], train_labels, classes)
        right = fitted.predict(test_x[:, :kept]) == test_labels
        share = float(variance[:kept].sum() / variance.sum().clamp_min(torch.finfo(torch.float64).tiny))
        scores.append(BottleneckScore(width=kept, variance=share, interval=bootstrap(right)))
    return scores
