"""Distances between predicted and target tokens, averaged with weights."""

from enum import StrEnum

import torch
from jaxtyping import Float
from torch import Tensor


class Objective(StrEnum):
    """The distance that the masked levels minimise."""

    smooth_l1 = "smooth_l1"
    l1 = "l1"
    l2 = "l2"
    cosine = "cosine"


def weighted_mean(distance: Float[Tensor, "B N"], weight: Float[Tensor, "B N"] | None) -> Float[Tensor, ""]:
    r"""Return $\frac1B \sum_b \sum_n w_{bn} d_{bn} / \sum_n w_{bn}$.

    Every image counts the same, so the mean over processes is the mean over the whole batch.
    """
    if weight is None:
        return distance.mean()
    total = weight.sum(1)
    return ((distance * weight).sum(1) / torch.where(total > 0, total, 1)).mean()


def smooth_l1(
    prediction: Float[Tensor, "B N D"],
    target: Float[Tensor, "B N D"],
    weight: Float[Tensor, "B N"] | None = None,
    beta: float = 1.0,
) -> Float[Tensor, ""]:
    r"""Smooth L1 distance, averaged over channels, then tokens.

    $e^2 / 2\beta$ where $|e| < \beta$, else $|e| - \beta/2$.

    Args:
        prediction: predicted tokens.
        target: wanted tokens.
        weight: weight of each token; None means 1.
        beta: where the quadratic part ends.

    Returns:
        The loss.

    Source:
        Girshick 2015 (Fast R-CNN), equation 3; the loss of the released I-JEPA program.
    """
    prediction, target = _promote(prediction, target)
    distance = torch.nn.functional.smooth_l1_loss(prediction, target, reduction="none", beta=beta)
    return weighted_mean(distance.mean(-1), weight)


def l1(
    prediction: Float[Tensor, "B N D"], target: Float[Tensor, "B N D"], weight: Float[Tensor, "B N"] | None = None
) -> Float[Tensor, ""]:
    """Mean absolute difference over channels, then the weighted mean over tokens (V-JEPA)."""
    prediction, target = _promote(prediction, target)
    return weighted_mean((prediction - target).abs().mean(-1), weight)


def l2(
    prediction: Float[Tensor, "B N D"], target: Float[Tensor, "B N D"], weight: Float[Tensor, "B N"] | None = None
) -> Float[Tensor, ""]:
    """Mean squared difference over channels, then the weighted mean over tokens (I-JEPA, section 3)."""
    prediction, target = _promote(prediction, target)
    return weighted_mean((prediction - target).square().mean(-1), weight)


def cosine(
    prediction: Float[Tensor, "B N D"], target: Float[Tensor, "B N D"], weight: Float[Tensor, "B N"] | None = None
) -> Float[Tensor, ""]:
    r"""Return $1 - \cos(\hat y, y)$, weighted mean over tokens."""
    prediction, target = _promote(prediction, target)
    return weighted_mean(1 - torch.nn.functional.cosine_similarity(prediction, target, dim=-1), weight)


def prediction_loss(
    objective: Objective,
    prediction: Float[Tensor, "B N D"],
    target: Float[Tensor, "B N D"],
    weight: Float[Tensor, "B N"] | None,
    beta: float,
) -> Float[Tensor, ""]:
    """Return the chosen distance."""
    if objective is Objective.smooth_l1:
        return smooth_l1(prediction, target, weight, beta)
    return {Objective.l1: l1, Objective.l2: l2, Objective.cosine: cosine}[objective](prediction, target, weight)


def _promote(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    return prediction.to(dtype), target.to(dtype)
