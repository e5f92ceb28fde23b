"""Few labels: logistic regression on 1, 5, 10 samples a class, or 1 % and 10 % of them, over several draws."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hjepa_eval.probes.accuracy import check_finite, check_known, check_widths, top1
from hjepa_eval.probes.logistic import fit_logistic, moments
from hjepa_eval.probes.precision import full_precision
from hjepa_eval.results.interval import Interval, interval_of_mean


@dataclass(kw_only=True, slots=True)
class FewShotConfig:
    """Which few labels, and how they are used.

    Attributes:
        shots: Samples of each class.
        shares: Shares of the samples of each class, in (0, 1]; at least one sample a class.
        draws: Number of draws of the samples for each of them.
        l2: Penalty of the logistic regression; nothing is left over to choose it on, so it is one number.
        seed: Of the draws.
    """

    shots: tuple[int, ...] = (1, 5, 10)
    shares: tuple[float, ...] = (0.01, 0.1)
    draws: int = 5
    l2: float = 1e-2
    seed: int = 0

    def __post_init__(self) -> None:
        self.shots, self.shares = tuple(self.shots), tuple(self.shares)
        if any(shot < 1 for shot in self.shots) or not all(0 < share <= 1 for share in self.shares):
            raise ValueError(f"shots={self.shots} shares={self.shares}: at least 1 sample, and shares in (0, 1]")
        if not self.shots and not self.shares:
            raise ValueError("shots=() shares=(): nothing to draw; give one of them")
        if self.draws < 2:
            raise ValueError(f"draws={self.draws}: an interval needs at least 2; 5 is usual")
        if self.l2 <= 0:
            raise ValueError(f"l2={self.l2}: above 0; 0.01 is usual")


@dataclass(kw_only=True, slots=True, frozen=True)
class FewShotScore:
    """Accuracy with few labels.

    Attributes:
        labels: "5-shot", "1%"; the share that was taken, where a class has too few samples for the one asked for.
        n_train: Labelled samples of a draw.
        draws: Top-1 accuracy of each draw, in [0, 1]; a single one where all samples are taken.
        interval: Their mean with its interval over draws; of a single one there is none.
    """

    labels: str
    n_train: int
    draws: tuple[float, ...]
    interval: Interval


def few_shot(
    train: Float[Tensor, "n D"],
    train_labels: Int[Tensor, " n"],
    test: Float[Tensor, "m D"],
    test_labels: Int[Tensor, " m"],
    config: FewShotConfig | None = None,
) -> list[FewShotScore]:
    """Accuracy on the test set of logistic regressions on few training samples, drawn anew several times.

    Features are standardised by the mean and deviation of all training features, which need no labels.

    Args:
        train: Training features.
        train_labels: Their classes, 0 and up.
        test: Test features.
        test_labels: Their classes.
        config: Numbers of labels, draws and penalty.

    Returns:
        A score for each number of labels; one that some class of the training set cannot give is left out.

    Raises:
        ValueError: Where a label is unknown, shapes disagree or features are not finite.
    """
    config = FewShotConfig() if config is None else config
    for name, rows, labels in (("train", train, train_labels), ("test", test, test_labels)):
        if labels.shape != rows.shape[:1]:
            raise ValueError(f"{name} {tuple(rows.shape)} and its labels {tuple(labels.shape)}: give one label a row")
        check_known(labels, f"{name}_labels")
    check_widths(train, test)
    check_finite(test, "test")
    train_labels, test_labels = train_labels.long(), test_labels.long()
    mean, scale = moments(train)
    x, test_x = ((part.detach().float() - mean) / scale for part in (train, test))
    classes = max(2, int(torch.maximum(train_labels.max(), test_labels.max())) + 1)
    counts = train_labels.bincount(minlength=classes).cpu()
    present = counts[counts > 0]
    wanted: dict[str, list[int]] = {}
    for shot in config.shots:
        if shot <= int(present.min()):
            wanted[f"{shot}-shot"] = [min(shot, int(count)) for count in counts]
    for share in config.shares:
        sizes = [max(1, round(share * int(count))) if count else 0 for count in counts]
        # A class of which the share is less than one sample gives more than that.
        given = share if round(share * int(present.min())) else sum(sizes) / len(train_labels)
        wanted[f"{100 * given:.3g}%"] = sizes
    scores = []
    for name, sizes in wanted.items():
        accuracies = []
        # Of all samples there is one draw.
        for draw in range(config.draws if sum(sizes) < len(train_labels) else 1):
            chosen = draw_samples(train_labels, sizes, seed=config.seed, draw=draw).to(x.device)
            ((weight, bias),) = fit_logistic(x[chosen], train_labels[chosen], classes, [config.l2])
            with full_precision(x.device.type):
                logits = test_x @ weight.T + bias
            accuracies.append(top1(logits.argmax(dim=1), test_labels))
        several = len(accuracies) > 1
        interval = interval_of_mean(accuracies, "draws") if several else Interval.without_ends(accuracies[0], 1)
        scores.append(FewShotScore(labels=name, n_train=sum(sizes), draws=tuple(accuracies), interval=interval))
    return scores


def draw_samples(labels: Int[Tensor, " n"], sizes: Sequence[int], *, seed: int, draw: int) -> Int[Tensor, " s"]:
    """Numbers of so many samples of each class; smaller draws of a seed are parts of larger ones.

    Args:
        labels: Classes of the samples.
        sizes: Samples wanted of each class.
        seed: Of all draws.
        draw: Number of this draw.

    Returns:
        The numbers, class by class, on the CPU.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + draw)
    order = torch.randperm(len(labels), generator=generator)
    labels = labels.cpu()[order]
    by_class = torch.split(order[labels.argsort(stable=True)], labels.bincount(minlength=len(sizes)).tolist())
    return torch.cat([members[:size] for members, size in zip(by_class, sizes, strict=True)])
