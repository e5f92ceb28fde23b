"""C-JEPA: prediction of tokens, with VICReg on the mean token of each image."""

import torch
from jaxtyping import Float
from torch import Tensor

from hjepa_models.objectives.prediction import Objective, mean_token, prediction_loss
from hjepa_models.objectives.vicreg import vicreg_terms


def cjepa_loss(
    prediction: Float[Tensor, "B N D"],
    target: Float[Tensor, "B N D"],
    weight: Float[Tensor, "B N"] | None = None,
    objective: Objective = Objective.l2,
    beta: float = 1.0,
    vicreg_weight: float = 0.001,
    invariance: float = 25.0,
    variance: float = 25.0,
    covariance: float = 1.0,
) -> Float[Tensor, ""]:
    r"""Return a prediction distance plus VICReg on the mean token of each image.

    $$d(\hat y, y) + \beta_\mathrm{vicreg}\,[\lambda\,s(\hat m, m) + \mu\,v(\hat m) + \nu\,c(\hat m)]$$

    with $\hat m_b$, $m_b$ the weighted means of an image's predicted and target tokens, s the mean squared difference
    and v, c the terms of `vicreg_terms` over the images of all processes. v and c keep the predictions from collapsing,
    which the moving average of I-JEPA alone does not guarantee; s holds their mean to that of the targets. The target
    side of v and c is left out: behind a moving average it has no gradient.

    What is the paper's: the sum, $\beta_\mathrm{vicreg} = 0.001$ and λ, μ, ν = 25, 25, 1. What is a choice, as no
    program was released: the features that the term takes (here the mean token of an image, since the paper speaks of
    learning the mean of patch representations) and that no projector stands before it.

    Args:
        prediction: predicted tokens.
        target: wanted tokens.
        weight: weight of each token; None means 1.
        objective: the distance d; `l2` is I-JEPA's.
        beta: where the quadratic part of `smooth_l1` ends.
        vicreg_weight: β_vicreg.
        invariance: λ; 0 leaves variance and covariance alone.
        variance: μ.
        covariance: ν.

    Returns:
        The loss; at least two images over all processes are needed.

    Source:
        Mo and Tong 2024 (C-JEPA, arXiv 2410.19560); VICReg (arXiv 2105.04906), equations 1 to 4.
    """
    distance = prediction_loss(objective, prediction, target, weight, beta)
    predicted, wanted = mean_token(prediction, weight), mean_token(target, weight)
    terms = vicreg_terms(predicted)
    difference = torch.nn.functional.mse_loss(predicted, wanted)
    return distance + vicreg_weight * (
        invariance * difference + variance * terms.variance + covariance * terms.covariance
    )
