"""Distances between predicted and target tokens, averaged with weights."""

from enum import StrEnum

import torch
from jaxtyping import Float
from torch import Tensor

from hjepa_models.objectives.symlog import symlog as to_symlog


class Objective(StrEnum):
    """What the predicted levels minimise: a distance, the cross entropy of bins, or telling targets apart."""

    smooth_l1 = "smooth_l1"
    l1 = "l1"
    l2 = "l2"
    cosine = "cosine"
    two_hot = "two_hot"
    patch_discrimination = "patch_discrimination"


DISTANCES = (Objective.smooth_l1, Objective.l1, Objective.l2, Objective.cosine)
"""The objectives that are distances, which `prediction_loss` computes."""


def weighted_mean(distance: Float[Tensor, "B N"], weight: Float[Tensor, "B N"] | None) -> Float[Tensor, ""]:
    r"""Return $\frac1B \sum_b \sum_n w_{bn} d_{bn} / \sum_n w_{bn}$.

    Every image counts the same, so the mean over processes is the mean over the whole batch.
    """
    if weight is None:
        return distance.mean()
    total = weight.sum(1)
    return ((distance * weight).sum(1) / torch.where(total > 0, total, 1)).mean()


def mean_token(tokens: Float[Tensor, "B N D"], weight: Float[Tensor, "B N"] | None = None) -> Float[Tensor, "B D"]:
    r"""Return $\sum_n w_{bn} x_{bn} / \sum_n w_{bn}$, 0 for an image without a known token; float32 at least."""
    tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    if weight is None:
        return tokens.mean(1)
    total = weight.sum(1, keepdim=True)
    share = weight / torch.where(total > 0, total, 1)
    return (tokens * share.to(tokens.dtype).unsqueeze(-1)).sum(1)


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
    symlog: bool = False,
) -> Float[Tensor, ""]:
    """Return the chosen distance.

    Args:
        objective: the distance.
        prediction: predicted tokens.
        target: wanted tokens.
        weight: weight of each token; None means 1.
        beta: where the quadratic part of `smooth_l1` ends.
        symlog: compare the symlog of both sides, so that large channels weigh less.

    Returns:
        The loss.

    Raises:
        ValueError: for an objective that is no distance.
    """
    if objective not in DISTANCES:
        raise ValueError(
            f"objective={objective}: no distance between tokens; allowed: {', '.join(DISTANCES)}; call its own function"
        )
    if symlog:
        prediction, target = (to_symlog(tokens) for tokens in _promote(prediction, target))
    if objective is Objective.smooth_l1:
        return smooth_l1(prediction, target, weight, beta)
    return {Objective.l1: l1, Objective.l2: l2, Objective.cosine: cosine}[objective](prediction, target, weight)


def _promote(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    return prediction.to(dtype), target.to(dtype)
