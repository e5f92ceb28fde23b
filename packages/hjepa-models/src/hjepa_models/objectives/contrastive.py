"""Contrast: a prediction must find its own target among others, token by token or image by image."""

from enum import StrEnum
from itertools import combinations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hjepa_models._validation import check_positive, coerce_choice
from hjepa_models.distributed import all_gather_rows, rank
from hjepa_models.objectives.prediction import weighted_mean


class ContrastScope(StrEnum):
    """Among which targets a predicted token must find its own."""

    image = "image"
    batch = "batch"


def patch_discrimination(
    prediction: Float[Tensor, "B K D"],
    target: Float[Tensor, "B K D"],
    temperature: float = 0.1,
    scope: ContrastScope | str = ContrastScope.image,
    weight: Float[Tensor, "B K"] | None = None,
) -> Float[Tensor, ""]:
    r"""Return the cross entropy with which predicted tokens find their own target tokens.

    $$-\frac1B \sum_b \frac{1}{\sum_k w_{bk}} \sum_k w_{bk} \ln \frac{e^{\cos(\hat y_{bk},\,y_{bk}) / \tau}}
    {\sum_{c \in \mathcal C} e^{\cos(\hat y_{bk},\,y_c) / \tau}}$$

    The candidates $\mathcal C$ are the K targets of the same image, or those of all images of all processes. Every
    image counts the same.

    Tokens that share a position have equal targets, and none can tell them apart: give each position once (a canvas).
    Targets are not detached here.

    Args:
        prediction: predicted tokens.
        target: their targets, token by token.
        temperature: τ.
        scope: `image` (memory B K²) or `batch` (memory B K times the number of all targets).
        weight: weight of each token; a token of weight 0 is neither asked nor a candidate. None means 1.

    Returns:
        The loss: from 0 up; the logarithm of the number of candidates where the prediction says nothing.

    Raises:
        ValueError: for an unknown scope or a temperature that is not above 0.

    Source:
        Wei et al. 2024 (Latent MIM, arXiv 2407.15837), patch discrimination; OlmoEarth (arXiv 2511.13655), which
        scores within an image and multiplies the loss by 2τ, a factor that is left to the caller's weight here; van den
        Oord et al. 2018 (CPC, arXiv 1807.03748), equation 4.
    """
    scope = coerce_choice(ContrastScope, "scope", scope)
    check_positive(temperature=temperature)
    images, tokens, _ = prediction.shape
    with torch.autocast(prediction.device.type, enabled=False):
        prediction, target = _unit(prediction), _unit(target)
        own = torch.arange(images * tokens, device=target.device).view(images, tokens)
        if scope is ContrastScope.image:
            own = own[:1].expand(images, -1)
            candidates = target
            known = None if weight is None else weight.unsqueeze(1)
        else:
            own = own + rank() * images * tokens
            candidates = all_gather_rows(target.flatten(0, 1))
            known = None if weight is None else all_gather_rows(weight.flatten())
        logits = prediction @ candidates.mT / temperature
        if known is not None:
            # Finite, so that the row of a token of weight 0 comes to 0 and not to NaN.
            logits = logits.masked_fill(known <= 0, -1e30)
        return weighted_mean(_cross_entropy(logits, own), weight)


def info_nce(first: Float[Tensor, "n D"], second: Float[Tensor, "n D"], temperature: float = 0.1) -> Float[Tensor, ""]:
    r"""Return the cross entropy with which the rows of two views of the same images find one another, both ways.

    $$-\frac{1}{2n} \sum_i \left[\ln \frac{e^{s_{ii}}}{\sum_j e^{s_{ij}}} + \ln \frac{e^{s_{ii}}}{\sum_j e^{s_{ji}}}
    \right], \qquad s_{ij} = \cos(z_i, z'_j) / \tau$$

    over the rows of all processes. The other rows of a row's own view are no candidates, unlike in SimCLR.

    Args:
        first: embeddings of one view, the rows of this process.
        second: embeddings of the other, row by row.
        temperature: τ.

    Returns:
        The mean over this process's rows; its mean over processes is the loss of the whole batch.

    Raises:
        ValueError: for a temperature that is not above 0.

    Source:
        van den Oord et al. 2018 (CPC, arXiv 1807.03748), equation 4; Chen et al. 2020 (SimCLR, arXiv 2002.05709),
        equation 1, for cosine and temperature; OlmoEarth (arXiv 2511.13655), instance contrast.

    >>> rows = torch.eye(3)
    >>> [round(float(info_nce(rows, rows.roll(k, 0))), 3) for k in (0, 1)]
    [0.0, 10.0]
    """
    check_positive(temperature=temperature)
    with torch.autocast(first.device.type, enabled=False):
        first, second = _unit(first), _unit(second)
        own = torch.arange(len(first), device=first.device) + rank() * len(first)
        forth = _cross_entropy(first @ all_gather_rows(second).T / temperature, own)
        back = _cross_entropy(second @ all_gather_rows(first).T / temperature, own)
        return (forth.mean() + back.mean()) / 2


def nt_xent(z: Float[Tensor, "V B P"], temperature: float = 0.2, whole: int | None = None) -> Float[Tensor, ""]:
    r"""Return SimCLR's normalised-temperature cross entropy, the mean over pairs of views.

    $$-\frac{1}{2B} \sum_i \ln \frac{e^{s_{i,j(i)}}}{\sum_{k \ne i} e^{s_{ik}}}$$

    over all 2B rows i of a pair, with j(i) the other view of i's image, s the cosine divided by the temperature, and k
    over both views of the images of all processes.

    Args:
        z: embeddings of two or more views, the rows of this process.
        temperature: of the softmax.
        whole: how many views, the first ones, are not small: pairs of two small ones are left out. None means all.

    Returns:
        The mean over this process's rows; its mean over processes is the loss of the whole batch.

    Raises:
        ValueError: for one view, or a temperature that is not above 0.

    Source:
        Chen et al. 2020 (SimCLR, arXiv 2002.05709), equation 1.

    >>> rows = torch.eye(3)
    >>> [round(float(nt_xent(torch.stack([rows, rows.roll(k, 0)]))), 3) for k in (0, 1)]
    [0.027, 5.027]
    """
    check_positive(temperature=temperature)
    if len(z) < 2:
        raise ValueError(f"z: {len(z)} view given; allowed: two or more of the same images; contrast needs a pair")
    with torch.autocast(z.device.type, enabled=False):
        views = [(unit, all_gather_rows(unit)) for unit in _unit(z)]
        own = torch.arange(z.shape[1], device=z.device) + rank() * z.shape[1]
        pairs = [(views[a], views[b]) for a, b in combinations(range(len(z)), 2) if whole is None or a < whole]
        losses = [_one_way(*pair, own, temperature) for a, b in pairs for pair in ((a, b), (b, a))]
        return torch.stack(losses).mean()


def _one_way(
    view: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], own: Int[Tensor, " B"], temperature: float
) -> Float[Tensor, ""]:
    """Return the loss of the rows of one view: each is asked for its partner, among all but itself."""
    rows, everyone = view[0], torch.cat([other[1], view[1]])
    logits = rows @ everyone.T / temperature
    itself = torch.nn.functional.one_hot(own + len(other[1]), len(everyone)).bool()
    return _cross_entropy(logits.masked_fill(itself, -torch.inf), own).mean()


def _unit(x: Tensor) -> Tensor:
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.nn.functional.normalize(x, dim=-1, eps=1e-6)


def _cross_entropy(logits: Float[Tensor, "... C"], own: Tensor) -> Float[Tensor, "..."]:
    return logits.logsumexp(-1) - logits.gather(-1, own.unsqueeze(-1)).squeeze(-1)
