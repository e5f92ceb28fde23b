"""Retrieval: mean average precision of ranking a gallery by cosine."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hjepa_eval.probes.accuracy import check_finite, check_known
from hjepa_eval.probes.rows import first_equal, norms, rows_at_once, unit

ELEMENTS = 2**25  # similarities held at once: 256 MiB, and some times as much to sort them


def average_precision(
    query: Float[Tensor, "m D"],
    query_labels: Int[Tensor, " m"],
    gallery: Float[Tensor, "n D"],
    gallery_labels: Int[Tensor, " n"],
    *,
    leave_out_self: bool = False,
) -> Float[Tensor, " m"]:
    """Average precision of each query when the whole gallery is ranked by cosine; a hit has the query's class.

    AP = mean over hits of (hits among the first r) / r,  r the rank of the hit

    The mean over queries is mAP. Equal cosines rank in the order of the gallery.

    Args:
        query: Features to search for.
        query_labels: Their classes, 0 and up.
        gallery: Features to search, on the same device.
        gallery_labels: Their classes, 0 and up.
        leave_out_self: Query i is row i of the gallery and does not count as its own hit.

    Returns:
        AP of each query in [0, 1], float64; NaN where the gallery has no hit (leave such queries out of the mean).

    Raises:
        ValueError: Where shapes disagree, a label is unknown or features are not finite.

    Example:
        >>> gallery, labels = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]), torch.tensor([0, 1, 0])
        >>> round(average_precision(torch.tensor([[1.0, 0.0]]), torch.tensor([0]), gallery, labels).item(), 4)
        0.8333
    """
    if query.ndim != 2 or gallery.ndim != 2 or query.shape[1] != gallery.shape[1] or not query.shape[1]:
        raise ValueError(f"query {tuple(query.shape)} and gallery {tuple(gallery.shape)}: both must be [n, D] of one D")
    if query_labels.shape != query.shape[:1] or gallery_labels.shape != gallery.shape[:1]:
        raise ValueError("query_labels, gallery_labels: give one label a row")
    if leave_out_self and len(query) != len(gallery):
        raise ValueError(f"leave_out_self=True: {len(query)} queries are not the {len(gallery)} rows of the gallery")
    check_known(query_labels, "query_labels")
    check_known(gallery_labels, "gallery_labels")
    check_finite(norms(gallery), "gallery")
    check_finite(norms(query), "query")
    # A matrix product may round the same row in two ways at two places: copies share one column.
    first = first_equal(gallery)
    distinct = (first == torch.arange(len(gallery), device=gallery.device)).nonzero().flatten()
    column = torch.searchsorted(distinct, first)
    tiles = torch.split(distinct, rows_at_once(gallery, 16))
    found = []
    for numbers in torch.split(torch.arange(len(query), device=query.device), max(1, ELEMENTS // max(1, len(gallery)))):
        asked = unit(query[numbers])
        similarity = torch.cat([asked @ unit(gallery[tile]).T for tile in tiles], dim=1)[:, column]
        if leave_out_self:
            similarity[torch.arange(len(numbers), device=query.device), numbers] = -torch.inf
        order = similarity.argsort(dim=1, descending=True, stable=True)
        if leave_out_self:
            order = order[:, :-1]
        hit = (gallery_labels[order] == query_labels[numbers, None]).double()
        rank = torch.arange(1, order.shape[1] + 1, device=query.device)
        found.append((hit * hit.cumsum(dim=1) / rank).sum(dim=1) / hit.sum(dim=1))
    return torch.cat(found)
