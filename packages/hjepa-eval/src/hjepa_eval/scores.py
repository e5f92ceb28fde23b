"""All measures of one set of features, with the names and counts that make the numbers mean something."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from hjepa_eval.extraction.features import FeatureName, FeatureSet
from hjepa_eval.measures.spectrum import Spread, effective_rank, rankme, spread
from hjepa_eval.probes.knn import knn_predict
from hjepa_eval.probes.logistic import LogisticProbe, LogisticProbeConfig
from hjepa_eval.results.interval import Interval, bootstrap
from hjepa_eval.results.measurement import Measurement

RANK_SAMPLES = 25_600  # what the RankMe paper takes


@dataclass(kw_only=True, slots=True, frozen=True)
class Scores:
    """What was measured on one set of features.

    Attributes:
        name: Encoder branch, level and pooling of the features.
        width: Their number of dimensions D.
        n_train: Labelled training samples (the bank of the kNN, the fit of the probe).
        n_test: Labelled test samples.
        knn: Top-1 accuracy in [0, 1] for each k; empty where there are no labels.
        linear: Top-1 accuracy of the linear probe in [0, 1]; None where there are no labels.
        linear_l2: The penalty chosen on the held-out part of the training samples; None where there are no labels.
        rankme: RankMe of n_rank training samples, evenly spaced; uncentred.
        effective_rank: Effective rank of the same samples, centred.
        spread: Standard deviation per dimension of the same samples.
        n_rank: Number of samples of the last three.
        intervals: 95 % intervals by metric ("knn_20", "linear"): bootstrap over the test samples.
    """

    name: FeatureName
    width: int
    n_train: int
    n_test: int
    knn: dict[int, float] = field(default_factory=dict)
    linear: float | None = None
    linear_l2: float | None = None
    rankme: float
    effective_rank: float
    spread: Spread
    n_rank: int
    intervals: dict[str, Interval] = field(default_factory=dict)

    def measurements(self) -> list[Measurement]:
        """The accuracies with their intervals, for a results file; measure_unlabelled gives the ranks with theirs."""
        return [
            Measurement.of(
                metric,
                self.name,
                interval,
                n_train=self.n_train,
                details={"l2": self.linear_l2} if metric == "linear" else {},
            )
            for metric, interval in self.intervals.items()
        ]

    def as_dict(self) -> dict[str, str | int | float | None]:
        """One flat row: names, counts and numbers, ready for JSON or a table."""
        return {
            "branch": self.name.branch,
            "level": self.name.level,
            "pooling": self.name.pooling,
            "width": self.width,
            "n_train": self.n_train,
            "n_test": self.n_test,
            **{f"knn_{k}": accuracy for k, accuracy in self.knn.items()},
            "linear": self.linear,
            "linear_l2": self.linear_l2,
            "rankme": self.rankme,
            "effective_rank": self.effective_rank,
            "spread_mean": self.spread.mean,
            "spread_minimum": self.spread.minimum,
            "n_rank": self.n_rank,
        }


def evaluate(
    train: FeatureSet,
    test: FeatureSet,
    *,
    ks: Sequence[int] = (20,),
    temperature: float = 0.07,
    probe: LogisticProbeConfig | None = None,
    rank_samples: int = RANK_SAMPLES,
    device: torch.device | str = "cpu",
) -> Scores:
    """Measure features: kNN and linear accuracy on the test set, RankMe, effective rank and spread on the training set.

    Samples without a label (-1) count for the ranks and are left out of the accuracies.

    Args:
        train: Training features; the probe's penalty is chosen on a part of them.
        test: Test features of the same name and width.
        ks: Numbers of neighbours; a k above the number of labelled training samples is left out.
        temperature: T of the kNN votes.
        probe: How the linear probe is fitted; None: its defaults.
        rank_samples: Training samples of RankMe, effective rank and spread, at most, evenly spaced (the cost grows with
            n * D^2).
        device: Where the measures are computed.

    Returns:
        The scores.

    Raises:
        ValueError: Where the two sets are not features of one name and width.
    """
    if train.name != test.name or train.values.shape[1] != test.values.shape[1]:
        raise ValueError(
            f"train ({train.name}, width {train.values.shape[1]}) and test ({test.name}, width {test.values.shape[1]}) "
            "are not the same features; extract both with one model and one level"
        )
    ranked = train.some(rank_samples).values.to(device)
    known_train, known_test = train.labelled(), test.labelled()
    intervals: dict[str, Interval] = {}
    linear: LogisticProbe | None = None
    if len(known_train) > 1 and len(known_test) > 0:
        x, y = known_train.values.to(device), known_train.labels.to(device)
        test_x, test_y = known_test.values.to(device), known_test.labels.to(device)
        possible = [k for k in ks if k <= len(known_train)]
        if possible:
            for k, predicted in knn_predict(x, y, test_x, ks=possible, temperature=temperature).items():
                intervals[f"knn_{k}"] = bootstrap((predicted == test_y).double())
        linear = LogisticProbe(probe).fit(x, y)
        intervals["linear"] = bootstrap((linear.predict(test_x) == test_y).double())
    return Scores(
        name=train.name,
        width=train.values.shape[1],
        n_train=len(known_train),
        n_test=len(known_test),
        knn={k: intervals[f"knn_{k}"].value for k in ks if f"knn_{k}" in intervals},
        linear=None if linear is None else intervals["linear"].value,
        linear_l2=None if linear is None else linear.l2,
        rankme=rankme(ranked).item(),
        effective_rank=effective_rank(ranked).item(),
        spread=spread(ranked),
        n_rank=len(ranked),
        intervals=intervals,
    )


def format_table(rows: Sequence[Scores]) -> str:
    """Scores as a Markdown table, one row for each set of features, every number with its names and counts.

    Args:
        rows: The scores.

    Returns:
        The table, without a newline at its end.
    """
    ks = sorted({k for row in rows for k in row.knn})
    header = ["branch", "level", "pooling", "D", *(f"kNN k={k}" for k in ks), "linear", "RankMe", "eff. rank"]
    header += ["n train/test/rank"]
    lines = [header, ["---"] * 3 + ["---:"] * (len(header) - 3)]
    for row in rows:
        accuracies = [row.knn.get(k) for k in ks] + [row.linear]
        lines.append(
            [
                row.name.branch,
                row.name.level,
                row.name.pooling,
                str(row.width),
                *("-" if value is None else f"{value:.3f}" for value in accuracies),
                f"{row.rankme:.1f}",
                f"{row.effective_rank:.1f}",
                f"{row.n_train}/{row.n_test}/{row.n_rank}",
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
