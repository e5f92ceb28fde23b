"""KL divergence between categoricals, balanced between prior and posterior, with free bits."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class KLBalance(NamedTuple):
    """What pulls a prior and a posterior together.

    Attributes:
        loss: the weighted terms, to be minimised.
        kl: the plain divergence in nats, averaged over rows, without gradient: what to watch.
    """

    loss: Float[Tensor, ""]
    kl: Float[Tensor, ""]


def categorical_kl(first_logits: Float[Tensor, "*B C"], second_logits: Float[Tensor, "*B C"]) -> Float[Tensor, "*B"]:
    r"""Return $\mathrm{KL}[p \| q] = \sum_c p_c (\log p_c - \log q_c)$ with $p, q$ the softmax of the logits.

    Args:
        first_logits: logits of p, finite.
        second_logits: logits of q, finite.

    Returns:
        Divergence of each distribution in nats, float32 at least.

    >>> certain, even = torch.tensor([20.0, 0.0]), torch.zeros(2)
    >>> round(float(categorical_kl(certain, even)), 4), round(float(categorical_kl(even, certain)), 4)
    (0.6931, 9.3069)
    """
    dtype = torch.promote_types(first_logits.dtype, torch.float32)
    first = first_logits.to(dtype).log_softmax(-1)
    second = second_logits.to(dtype).log_softmax(-1)
    divergence: Tensor = (first.exp() * (first - second)).sum(-1)
    return divergence


def kl_balance(
    posterior_logits: Float[Tensor, "*B G C"],
    prior_logits: Float[Tensor, "*B G C"],
    free_bits: float = 1.0,
    dynamics: float = 0.5,
    representation: float = 0.1,
) -> KLBalance:
    r"""Pull the prior to the posterior, and the posterior a little to the prior.

    $$\beta_{dyn} \max(f, \mathrm{KL}[sg(q) \| p]) + \beta_{rep} \max(f, \mathrm{KL}[q \| sg(p)])$$

    The divergence is summed over the G categoricals, cut below at f row by row, then averaged over the rows. A row
    below f adds a constant and no gradient.

    Args:
        posterior_logits: logits of q.
        prior_logits: logits of p.
        free_bits: f in nats; 0 leaves the divergence whole.
        dynamics: weight of the term that trains the prior.
        representation: weight of the term that trains the posterior.

    Returns:
        The loss and the divergence.

    Source:
        Hafner et al. 2023 (DreamerV3, arXiv 2301.04104). The default weights 0.5 and 0.1 are those of the first version
        (equations 4 and 5) and its program; the second version (2024, equations 2 and 3) and the one in Nature (2025)
        raise `dynamics` to 1.
    """
    divergence = categorical_kl(posterior_logits, prior_logits.detach()).sum(-1)
    trains_prior = dynamics_kl(posterior_logits, prior_logits, free_bits)
    trains_posterior = divergence.clamp(min=free_bits).mean()
    return KLBalance(dynamics * trains_prior + representation * trains_posterior, divergence.detach().mean())


def dynamics_kl(
    posterior_logits: Float[Tensor, "*B G C"], prior_logits: Float[Tensor, "*B G C"], free_bits: float = 1.0
) -> Float[Tensor, ""]:
    r"""Return the mean of $\max(f, \mathrm{KL}[sg(q) \| p])$: the part of `kl_balance` that trains the prior.

    Args:
        posterior_logits: logits of q.
        prior_logits: logits of p.
        free_bits: f in nats.

    Returns:
        The unweighted term.
    """
    return categorical_kl(posterior_logits.detach(), prior_logits).sum(-1).clamp(min=free_bits).mean()
