"""VICReg: variance, invariance, covariance, with statistics over the rows of all processes."""

from enum import StrEnum
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from hjepa_models._validation import coerce_choice
from hjepa_models.distributed import all_gather_rows, all_reduce_mean, world_size


class VICRegTerms(NamedTuple):
    """The two terms that keep one batch of embeddings from collapsing."""

    variance: Float[Tensor, ""]
    covariance: Float[Tensor, ""]


class VICRegForm(StrEnum):
    """Which of the authors' three forms of the loss, all with weights of 25, 25 and 1."""

    algorithm = "algorithm"
    equations = "equations"
    released = "released"


def vicreg_terms(
    z: Float[Tensor, "n D"], gamma: float = 1.0, eps: float = 1e-4, weight: Float[Tensor, " n"] | None = None
) -> VICRegTerms:
    r"""Return the variance and covariance terms of a batch.

    $$v = \frac1D \sum_j \max(0, \gamma - \sqrt{C_{jj} + \epsilon}), \qquad c = \frac1D \sum_{i \ne j} C_{ij}^2$$

    with the covariance $C$ (divisor n − 1) over the rows of all processes. Both see a batch that shrinks (v) or that
    lies in fewer directions than it has channels (c, and v where channels die); neither sees where its mean lies.

    With weights, $C = \frac{\sum_r w_r (z_r - \bar z)(z_r - \bar z)^T}{\sum_r w_r - \sum_r w_r^2 / \sum_r w_r}$ about
    the weighted mean: weights of 0 and 1 leave rows out, a common factor changes nothing. The tokens of a pyramid level
    go in as `level.values.flatten(0, 1)` with `level.weight.flatten()`.

    Args:
        z: embeddings, the rows of this process; at least two rows over all processes.
        gamma: standard deviation wanted.
        eps: keeps the root differentiable at 0.
        weight: weight of each row; None means 1.

    Returns:
        Both terms.

    Source:
        Bardes et al. 2022 (arXiv 2105.04906), equations 1 to 4.
    """
    with torch.autocast(z.device.type, enabled=False):
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        if weight is None:
            diagonal, squares = _covariance(z)
        else:
            covariance = _weighted_covariance(z, weight.to(z.dtype))
            diagonal, squares = covariance.diagonal(), covariance.square().sum()
        variance = torch.relu(gamma - (diagonal + eps).sqrt()).mean()
        return VICRegTerms(variance, (squares - diagonal.square().sum()) / z.shape[1])


def vicreg_loss(
    first: Float[Tensor, "n D"],
    second: Float[Tensor, "n D"],
    invariance: float = 25.0,
    variance: float = 25.0,
    covariance: float = 1.0,
    form: VICRegForm | str = VICRegForm.algorithm,
) -> Float[Tensor, ""]:
    r"""Return $\lambda\,s(Z, Z') + \mu\,[v(Z) + v(Z')] + \nu\,[c(Z) + c(Z')]$.

    The authors give three forms that differ in the weight of the terms:

    - `algorithm`: the paper's Algorithm 1. $s = \frac{1}{nD} \sum_r \|z_r - z'_r\|^2$, the mean over channels too. The
      default: it is what the paper says was run, and its balance does not shift with the width.
    - `equations`: the paper's equation 5. $s = \frac1n \sum_r \|z_r - z'_r\|^2$, D times as much.
    - `released`: the released program. s as in `algorithm`, and half the variance term: $\frac\mu2 [v(Z) + v(Z')]$.

    Args:
        first: embeddings of one view.
        second: embeddings of the other, row by row.
        invariance: λ.
        variance: μ.
        covariance: ν.
        form: which form.

    Returns:
        The loss. The invariance term is the mean over this process's rows.

    Raises:
        ValueError: for an unknown form.

    Source:
        Bardes et al. 2022 (arXiv 2105.04906), equations 1 to 6 and Algorithm 1.
    """
    form = coerce_choice(VICRegForm, "form", form)
    dtype = torch.promote_types(first.dtype, torch.float32)
    similarity = (first.to(dtype) - second.to(dtype)).square().mean()
    if form is VICRegForm.equations:
        invariance = invariance * first.shape[1]
    if form is VICRegForm.released:
        variance = variance / 2
    terms = vicreg_terms(first), vicreg_terms(second)
    return (
        invariance * similarity
        + variance * (terms[0].variance + terms[1].variance)
        + covariance * (terms[0].covariance + terms[1].covariance)
    )


def _covariance(z: Float[Tensor, "n D"]) -> tuple[Float[Tensor, " D"], Float[Tensor, ""]]:
    """Return the diagonal of the covariance and the sum of the squares of all its entries."""
    rows = len(z) * world_size()
    centred = z - all_reduce_mean(z.mean(0))
    # One row has no covariance: 0 and no division by it.
    degrees = max(rows - 1, 1)
    if rows < z.shape[1]:
        # Z^T Z and Z Z^T have the same sum of squares, and the second is the smaller one.
        everyone = all_gather_rows(centred)
        return everyone.square().sum(0) / degrees, (everyone @ everyone.T / degrees).square().sum()
    covariance = all_reduce_mean(centred.T @ centred / len(z)) * (rows / degrees)
    return covariance.diagonal(), covariance.square().sum()


def _weighted_covariance(z: Float[Tensor, "n D"], weight: Float[Tensor, " n"]) -> Float[Tensor, "D D"]:
    moments = all_reduce_mean(torch.cat([torch.stack([weight.sum(), weight.square().sum()]), weight @ z]))
    total, squares, sums = moments[0], moments[1], moments[2:]
    total = torch.where(total > 0, total, 1)
    centred = z - sums / total
    biased = all_reduce_mean((weight.unsqueeze(-1) * centred).T @ centred) / total
    # Fewer than two known rows have no covariance: 0 and not NaN.
    return biased / (1 - squares / (total.square() * world_size())).clamp(min=1e-6)
