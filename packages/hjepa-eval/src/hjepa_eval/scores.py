"""All measures of one set of features, with the names and counts that make the numbers mean something."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hjepa_eval.extraction.features import FeatureName, FeatureSet
from hjepa_eval.measures.report import MEASURES, RANGES
from hjepa_eval.probes.logistic import LogisticProbe, LogisticProbeConfig
from hjepa_eval.probes.whitening import FLOOR, KNN, WHITE_KNN, knn_by_metric
from hjepa_eval.results.interval import Interval, bootstrap, jackknife
from hjepa_eval.results.measurement import Measurement
from hjepa_eval.results.table import plus_minus

RANK_SAMPLES = 25_600  # what the RankMe paper takes
GROUPS = 10  # of the jackknife
_RANKS = ("rankme", "effective_rank", "spread")


@dataclass(kw_only=True, slots=True, frozen=True)
class Scores:
    """What was measured on one set of features.

    Attributes:
        name: Encoder branch, level and pooling of the features.
        width: Their number of dimensions D.
        n_train: Labelled training samples (the bank of the kNN, the fit of the probe).
        n_test: Labelled test samples.
        n_rank: Training samples of RankMe, effective rank and spread.
        linear_l2: The penalty chosen on the held-out part of the training samples; None where there are no labels.
        intervals: The numbers with their 95 % intervals by metric: "knn_20", "white_knn_20" (the same of whitened
            features), "linear" (top-1 accuracies, bootstrap over the test samples; not there where there are no
            labels), "rankme" (uncentred), "effective_rank" (centred) and "spread" (mean standard deviation of a
            dimension), jackknife over training samples, none of fewer than 20.
    """

    name: FeatureName
    width: int
    n_train: int
    n_test: int
    n_rank: int
    linear_l2: float | None = None
    intervals: dict[str, Interval] = field(default_factory=dict)

    @property
    def knn(self) -> dict[int, float]:
        """Top-1 accuracy in [0, 1] for each k."""
        found = {metric: one.value for metric, one in self.intervals.items() if metric.startswith(KNN)}
        return {int(metric.removeprefix(KNN)): value for metric, value in found.items()}

    @property
    def linear(self) -> float | None:
        """Top-1 accuracy of the linear probe in [0, 1]; None where there are no labels."""
        return self._value("linear")

    @property
    def rankme(self) -> float | None:
        """RankMe; None where no rank was asked for."""
        return self._value("rankme")

    @property
    def effective_rank(self) -> float | None:
        """Centred effective rank; None where no rank was asked for."""
        return self._value("effective_rank")

    def _value(self, metric: str) -> float | None:
        return self.intervals[metric].value if metric in self.intervals else None

    def measurements(self) -> list[Measurement]:
        """The numbers with their intervals, for a results file."""
        return [
            Measurement.of(
                metric,
                self.name,
                interval,
                n_train=None if metric in _RANKS else self.n_train,
                details={"width": self.width} | ({"l2": self.linear_l2} if metric == "linear" else {}),
            )
            for metric, interval in self.intervals.items()
        ]


def evaluate(
    train: FeatureSet,
    test: FeatureSet,
    *,
    ks: Sequence[int] = (20,),
    temperature: float = 0.07,
    whitening: float | None = FLOOR,
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
        whitening: Floor of the `Whitening`, fitted to the labelled training samples, after which the kNN is measured
            once more; None: not measured (the time grows with D^3: some seconds at a width of 3,000).
        probe: How the linear probe is fitted; None: its defaults.
        rank_samples: Training samples of RankMe, effective rank and spread, at most, drawn by a fixed seed (the cost
            grows with n * D^2, eleven times for the intervals); 0: without them.
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
    ranked = train.some(rank_samples)
    known_train, known_test = train.labelled(), test.labelled()
    intervals: dict[str, Interval] = {}
    linear: LogisticProbe | None = None
    if len(known_train) > 1 and len(known_test) > 0:
        x, y = known_train.values.to(device), known_train.labels.to(device)
        test_x, test_y = known_test.values.to(device), known_test.labels.to(device)
        possible = [k for k in ks if k <= len(known_train)]
        found = knn_by_metric(x, y, test_x, ks=possible, temperature=temperature, floor=whitening)
        intervals |= {metric: bootstrap(predicted == test_y) for metric, predicted in found.items()}
        linear = LogisticProbe(probe).fit(x, y)
        intervals["linear"] = bootstrap(linear.predict(test_x) == test_y)
    return Scores(
        name=train.name,
        width=train.values.shape[1],
        n_train=len(known_train),
        n_test=len(known_test),
        n_rank=len(ranked),
        linear_l2=None if linear is None else linear.l2,
        intervals=intervals | (_ranks(ranked.values.to(device)) if len(ranked) > 1 else {}),
    )


def _ranks(z: Tensor) -> dict[str, Interval]:
    if len(z) >= 2 * GROUPS:
        return {metric: jackknife(z, MEASURES[metric], groups=GROUPS, within=RANGES[metric]) for metric in _RANKS}
    return {metric: Interval.without_ends(float(MEASURES[metric](z)), len(z)) for metric in _RANKS}


def format_table(rows: Sequence[Scores]) -> str:
    """Scores as a Markdown table, one row for each set of features, every number with its names, interval and counts.

    After ± stands half the width of the 95 % interval.

    Args:
        rows: The scores.

    Returns:
        The table, without a newline at its end.
    """
    ks = sorted({k for row in rows for k in row.knn})
    whitened = [k for k in ks if any(f"{WHITE_KNN}{k}" in row.intervals for row in rows)]
    header = ["branch", "level", "pooling", "D", *(f"kNN k={k}" for k in ks), *(f"whitened k={k}" for k in whitened)]
    header += ["linear", "RankMe", "eff. rank", "n train/test/rank"]
    lines = [header, ["---"] * 3 + ["---:"] * (len(header) - 3)]
    for row in rows:
        metrics = [*(f"{KNN}{k}" for k in ks), *(f"{WHITE_KNN}{k}" for k in whitened)]
        metrics += ["linear", "rankme", "effective_rank"]
        lines.append(
            [
                row.name.branch,
                row.name.level,
                row.name.pooling,
                str(row.width),
                *(plus_minus(row.intervals.get(metric)) for metric in metrics),
                f"{row.n_train}/{row.n_test}/{row.n_rank}",
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
