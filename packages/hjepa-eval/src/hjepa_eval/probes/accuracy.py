"""Accuracy, and the split of the training samples that choices are made on."""

import torch
from jaxtyping import Int
from torch import Tensor


def top1(predicted: Int[Tensor, " m"], labels: Int[Tensor, " m"]) -> float:
    """Share of equal entries, in [0, 1].

    Args:
        predicted: Predicted classes.
        labels: True classes.

    Returns:
        The accuracy over samples (not averaged over classes), of this process.

    Raises:
        ValueError: Where there is no label, not one a prediction, or one is unknown.
    """
    check_known(labels)
    if predicted.shape != labels.shape:
        raise ValueError(f"labels {tuple(labels.shape)}: give one for each of the {len(predicted)} samples")
    return int((predicted == labels).sum()) / len(labels)


def check_known(labels: Int[Tensor, " n"], name: str = "labels") -> None:
    """Raise a ValueError where there is no label, one is unknown or they are no integers; ``name`` is what they are."""
    if labels.is_floating_point():
        raise ValueError(f"{name} of {labels.dtype}: they must be integers, the numbers of the classes")
    if not len(labels) or int(labels.min()) < 0:
        raise ValueError(f"{name}: there are none, or some are below 0 (unknown); leave out what has no label")


def count_classes(labels: Int[Tensor, " n"], num_classes: int | None) -> int:
    """Number of classes, at least 2: of the labels where it is not given.

    Raises:
        ValueError: Where a label lies beyond the number that is given.
    """
    largest = int(labels.max())
    if num_classes is not None and num_classes <= largest:
        raise ValueError(f"num_classes={num_classes}: labels go up to {largest}; allowed: {largest + 1} and more")
    return max(2, largest + 1 if num_classes is None else num_classes)


def check_finite(values: Tensor, name: str = "features") -> None:
    """Raise a ValueError where some value is NaN or infinite; ``name`` is what to call them."""
    if not bool(values.isfinite().all()):
        raise ValueError(f"{name}: NaN or infinity in some; look at what gives them")


def check_widths(train: Tensor, test: Tensor) -> None:
    """Raise a ValueError where training and test features are not [n, D] and [m, D] of one width, at least 1."""
    if train.ndim != 2 or test.ndim != 2 or train.shape[1] != test.shape[1] or train.shape[1] < 1:
        raise ValueError(f"train {tuple(train.shape)} and test {tuple(test.shape)}: both must be [n, D] of one width D")


def split(count: int, held_out: float, seed: int) -> tuple[Int[Tensor, " f"], Int[Tensor, " h"]]:
    """Numbers of the samples that are fitted and of those that are held out to choose among fits.

    Args:
        count: Number of training samples, at least 2.
        held_out: Share that is held out, in (0, 1); at least one sample is held out and one is fitted.
        seed: Of the split.

    Returns:
        The fitted and the held-out samples, each in a random order.
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    held = min(count - 1, max(1, round(held_out * count)))
    return order[held:], order[:held]
