"""VICReg: variance, invariance, covariance, with statistics over the rows of all processes."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from hjepa_models.distributed import all_reduce_mean, world_size


class VICRegTerms(NamedTuple):
    """The two terms that keep one batch of embeddings from collapsing."""

    variance: Float[Tensor, ""]
    covariance: Float[Tensor, ""]


def vicreg_terms(z: Float[Tensor, "n D"], gamma: float = 1.0, eps: float = 1e-4) -> VICRegTerms:
    r"""Return the variance and covariance terms of a batch.

    $$v = \frac1D \sum_j \max(0, \gamma - \sqrt{C_{jj} + \epsilon}), \qquad c = \frac1D \sum_{i \ne j} C_{ij}^2$$

    with the covariance $C$ (divisor n − 1) over the rows of all processes.

    Args:
        z: embeddings, the rows of this process; at least two rows over all processes.
        gamma: standard deviation wanted.
        eps: keeps the root differentiable at 0.

    Returns:
        Both terms.

    Source:
        Bardes et al. 2022 (arXiv 2105.04906), equations 1 to 4.
    """
    with torch.autocast(z.device.type, enabled=False):
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        rows = len(z) * world_size()
        centred = z - all_reduce_mean(z.mean(0))
        covariance = all_reduce_mean(centred.T @ centred / len(z)) * (rows / (rows - 1))
        diagonal = covariance.diagonal()
        variance = torch.relu(gamma - (diagonal + eps).sqrt()).mean()
        width = z.shape[1]
        return VICRegTerms(variance, (covariance.square().sum() - diagonal.square().sum()) / width)


def vicreg_loss(
    first: Float[Tensor, "n D"],
    second: Float[Tensor, "n D"],
    invariance: float = 25.0,
    variance: float = 25.0,
    covariance: float = 1.0,
) -> Float[Tensor, ""]:
    r"""Return $\lambda\,s(Z, Z') + \mu\,[v(Z) + v(Z')] + \nu\,[c(Z) + c(Z')]$ with s the mean squared difference.

    Args:
        first: embeddings of one view.
        second: embeddings of the other, row by row.
        invariance: λ.
        variance: μ.
        covariance: ν.

    Returns:
        The loss. The invariance term is the mean over this process's rows.

    Source:
        Bardes et al. 2022 (arXiv 2105.04906), equation 6, with s averaged over channels as well.
    """
    dtype = torch.promote_types(first.dtype, torch.float32)
    similarity = (first.to(dtype) - second.to(dtype)).square().mean()
    terms = vicreg_terms(first), vicreg_terms(second)
    return (
        invariance * similarity
        + variance * (terms[0].variance + terms[1].variance)
        + covariance * (terms[0].covariance + terms[1].covariance)
    )
