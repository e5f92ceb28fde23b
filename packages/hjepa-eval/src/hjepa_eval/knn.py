"""Weighted k-nearest-neighbour classification: exact, in chunks of bounded memory."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

CHUNK_ELEMENTS = 2**25  # similarities held at once: 128 MiB of float32
SPARE_CANDIDATES = 16  # neighbours beyond k that float32 keeps for the float64 ranking


def knn_predict(
    train: Float[Tensor, "n D"],
    train_labels: Int[Tensor, " n"],
    test: Float[Tensor, "m D"],
    *,
    ks: Sequence[int] = (20,),
    temperature: float = 0.07,
    chunk: int | None = None,
    num_classes: int | None = None,
) -> dict[int, Int[Tensor, " m"]]:
    """Predict the class of each test row by the weighted votes of its k nearest training rows.

    Rows are divided by their L2 norm; neighbour j of a test row i votes for its class with exp(cos(i, j) / T), and the
    class with the largest sum wins (the lowest class in a tie). Candidates are found by a float32 product and ranked
    and weighed by float64 cosines, so that the result does not depend on the chunks.

    Args:
        train: Features of the bank.
        train_labels: Their classes, 0 and up.
        test: Features to classify, on the same device.
        ks: Numbers of neighbours; all are computed in one pass.
        temperature: T of the votes.
        chunk: Test rows at a time; None: as many as keep the similarities under 128 MiB.
        num_classes: Number of classes; None: the largest label + 1.

    Returns:
        The predicted classes for each k.

    Raises:
        ValueError: Where a k is not in [1, n], shapes disagree or a label is unknown.

    Source:
        Wu et al. 2018 (arXiv 1805.01978), section 3.4; T = 0.07 and the values of k as in DINOv2 (arXiv 2304.07193).
    """
    ks = tuple(dict.fromkeys(ks))
    _check(train, train_labels, test, ks)
    classes = int(train_labels.max()) + 1 if num_classes is None else num_classes
    bank = F.normalize(train.float(), dim=1)
    exact_bank = F.normalize(train.double(), dim=1)
    step = chunk if chunk is not None else max(1, CHUNK_ELEMENTS // len(train))
    candidates = min(len(train), max(ks) + SPARE_CANDIDATES)
    parts: dict[int, list[Tensor]] = {k: [] for k in ks}
    for rows in torch.split(test, step):
        _, index = (F.normalize(rows.float(), dim=1) @ bank.T).topk(candidates, dim=1)
        # Sorted by index first, so that a stable sort gives equal cosines in the order of the bank.
        index = index.sort(dim=1).values
        cosine = _candidate_cosines(F.normalize(rows.double(), dim=1), exact_bank, index)
        cosine, order = cosine.sort(dim=1, descending=True, stable=True)
        neighbours = train_labels[index.gather(1, order)]
        # exp((cos - 1) / T) is the vote up to one factor, which no comparison sees.
        weight = ((cosine - 1) / temperature).exp()
        for k in ks:
            votes = weight.new_zeros(len(rows), classes)
            votes.scatter_add_(1, neighbours[:, :k], weight[:, :k])
            parts[k].append(votes.argmax(dim=1))
    return {k: torch.cat(parts[k]) for k in ks}


def knn_accuracy(
    train: Float[Tensor, "n D"],
    train_labels: Int[Tensor, " n"],
    test: Float[Tensor, "m D"],
    test_labels: Int[Tensor, " m"],
    *,
    ks: Sequence[int] = (20,),
    temperature: float = 0.07,
    chunk: int | None = None,
) -> dict[int, float]:
    """Share of test rows whose class knn_predict finds, in [0, 1], for each k.

    Args:
        train: Features of the bank.
        train_labels: Their classes.
        test: Features to classify.
        test_labels: Their true classes.
        ks: Numbers of neighbours.
        temperature: T of the votes.
        chunk: Test rows at a time; see knn_predict.

    Returns:
        Top-1 accuracy for each k.

    Raises:
        ValueError: As knn_predict.
    """
    if test_labels.shape != test.shape[:1]:
        raise ValueError(f"test_labels of shape {tuple(test_labels.shape)} for {len(test)} rows: give one label a row")
    if len(test) == 0 or int(test_labels.min()) < 0:
        raise ValueError("test_labels: there are none, or some are below 0 (unknown); leave out what has no label")
    classes = int(torch.maximum(train_labels.max(), test_labels.max())) + 1 if len(train) else 1
    predicted = knn_predict(
        train, train_labels, test, ks=ks, temperature=temperature, chunk=chunk, num_classes=max(2, classes)
    )
    return {k: top1(p, test_labels, max(2, classes)) for k, p in predicted.items()}


def top1(predicted: Int[Tensor, " m"], labels: Int[Tensor, " m"], num_classes: int) -> float:
    """Share of equal entries, in [0, 1].

    Args:
        predicted: Predicted classes.
        labels: True classes.
        num_classes: Number of classes.

    Returns:
        The accuracy over samples (not averaged over classes).
    """
    # torchmetrics brings torchvision and scipy along: seconds that only a measurement has to wait for.
    from torchmetrics.functional.classification import multiclass_accuracy

    return float(multiclass_accuracy(predicted, labels, num_classes=max(2, num_classes), average="micro"))


def _candidate_cosines(
    rows: Float[Tensor, "b D"], bank: Float[Tensor, "n D"], index: Int[Tensor, "b c"]
) -> Float[Tensor, "b c"]:
    """Float64 cosines of each row with its candidates, gathered in pieces of bounded memory."""
    step = max(1, CHUNK_ELEMENTS // (4 * index.shape[1] * bank.shape[1]))
    pieces = zip(torch.split(rows, step), torch.split(index, step), strict=True)
    return torch.cat([torch.einsum("bd,bcd->bc", row, bank[chosen]) for row, chosen in pieces])


def _check(train: Tensor, train_labels: Tensor, test: Tensor, ks: Sequence[int]) -> None:
    if train.ndim != 2 or test.ndim != 2 or train.shape[1] != test.shape[1]:
        raise ValueError(f"train {tuple(train.shape)} and test {tuple(test.shape)}: both must be [n, D] of one width D")
    if train_labels.shape != train.shape[:1]:
        raise ValueError(
            f"train_labels of shape {tuple(train_labels.shape)} for {len(train)} rows: give one label a row"
        )
    if not ks or min(ks) < 1 or max(ks) > len(train):
        raise ValueError(f"ks={tuple(ks)}: each k must be from 1 to the {len(train)} training samples")
    if int(train_labels.min()) < 0:
        raise ValueError("train_labels: some are below 0 (unknown); leave out the samples that have no label")
