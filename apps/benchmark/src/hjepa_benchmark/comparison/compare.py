"""What tells runs apart: settings, results, and differences on the same samples."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from torch import Tensor

from hjepa_benchmark.runs import finished_steps, training_seconds
from hjepa_benchmark.suite.findings import read_right, sample_key
from hjepa_benchmark.suite.run import FOLDER, RESULTS_FILE
from hjepa_eval import Interval, Measurement, Results, bootstrap, interval_of_mean, read_results
from hjepa_pretrain import settings
from hjepa_pretrain.report.write import read_rows
from hjepa_pretrain.results import TRAINED, subject_of

# What differs between any two runs, and what says nothing about them.
_LEFT_OUT = ("run.dir", "provenance", "trainer.parallel.", "logger.", "plan.")
SEED = "run.seed"
# Of a run of a measured length it follows from that, unless the command names it.
_WARMUP = "trainer.learning_rate.warmup_steps"


@dataclass(kw_only=True, slots=True)
class Candidate:
    """One of the runs.

    Attributes:
        name: tells it apart.
        folder: where it lies.
        results: of its suite.
        right: which test samples were right, by metric and features.
        settings: of its configuration, dotted.
        rows: of `metrics.jsonl`.
    """

    name: str
    folder: Path
    results: Results
    right: dict[str, Tensor]
    settings: dict[str, Any]
    rows: list[dict[str, float]]

    def trained(self) -> list[Measurement]:
        """The measurements of the trained model."""
        return [one for one in self.results.measurements if subject_of(one.name.branch) == TRAINED]


@dataclass(kw_only=True, slots=True, frozen=True)
class Difference:
    """A run minus the first one, on the same samples.

    Attributes:
        run: name of the run.
        metric: an accuracy.
        level: of the features.
        interval: the difference with its paired bootstrap interval.
    """

    run: str
    metric: str
    level: str
    interval: Interval


def read_candidates(folders: Sequence[Path]) -> list[Candidate]:
    """Read what the suite left in some folders.

    Raises:
        ValueError: a file is missing or damaged.
    """
    plain = [folder.resolve() for folder in folders]
    names = [folder.name for folder in plain]
    if len(set(names)) < len(names):
        names = [f"{folder.parent.name}/{folder.name}" for folder in plain]
    if len(set(plain)) < len(plain):
        raise ValueError(f"runs {', '.join(map(str, folders))}: one is given twice; give different folders")
    if len(set(names)) < len(names):
        names = [str(folder) for folder in plain]
    return [
        Candidate(
            name=name,
            folder=folder,
            results=read_results(folder / FOLDER / RESULTS_FILE),
            right=read_right(folder / FOLDER),
            settings=read_settings(folder),
            rows=read_rows(folder, finished_steps(folder)),
        )
        for name, folder in zip(names, plain, strict=True)
    ]


def read_settings(folder: Path) -> dict[str, Any]:
    """The stored configuration of a run, by dotted names."""
    content = yaml.safe_load((folder / settings.CONFIG_FILE).read_text(encoding="utf-8"))
    return dict(_leaves(content))


def differing_settings(runs: Sequence[Candidate]) -> dict[str, list[str]]:
    """Settings that are not the same in all runs, with the value of each run."""
    keys = dict.fromkeys(
        key for run in runs for key in run.settings if not key.startswith(_LEFT_OUT) and key not in settings.DERIVED
    )
    found = {key: [str(run.settings.get(key, "-")) for run in runs] for key in keys}
    return {key: values for key, values in found.items() if len(set(values)) > 1}


def paired_differences(runs: Sequence[Candidate], metrics: Sequence[str]) -> list[Difference]:
    """Accuracy of each run minus that of the first, sample by sample, for the levels that both have.

    Args:
        runs: the first is what the others are compared with.
        metrics: accuracies.

    Returns:
        The differences; none for a run that was tested on other samples.
    """
    first, found = runs[0], []
    names = {(one.metric, one.name) for one in first.trained() if one.metric in metrics}
    for run in runs[1:]:
        if run.results.about.get("test_samples") != first.results.about.get("test_samples"):
            continue
        # A run without a moving average has the same levels of another branch; earlier versions named another pooling.
        own = {(one.metric, one.name.level): one.name for one in run.trained()}
        for metric, name in sorted(names, key=lambda pair: (metrics.index(pair[0]), pair[1].level)):
            other = own.get((metric, name.level), name)
            before, after = first.right.get(sample_key(metric, name)), run.right.get(sample_key(metric, other))
            if before is not None and after is not None:
                gain = bootstrap(after.double() - before.double())
                found.append(Difference(run=run.name, metric=metric, level=name.level, interval=gain))
    return found


def group_by_settings(runs: Sequence[Candidate]) -> dict[str, list[Candidate]]:
    """Runs that differ in the seed alone, by the settings that tell the groups apart."""
    runs = [replace(run, settings=_asked(run)) for run in runs]
    keys = [key for key in differing_settings(runs) if key != SEED]
    groups: dict[str, list[Candidate]] = {}
    for run in runs:
        label = " ".join(f"{key}={run.settings.get(key, '-')}" for key in _leading(keys, runs))
        groups.setdefault(label or "all", []).append(run)
    return groups


def group_interval(group: Sequence[Candidate], metric: str, level: str) -> Measurement | None:
    """Mean of a metric over the seeds of a group with its interval; of a single seed its (first) own measurement.

    Runs of one seed, such as a copy, count as one. None where a seed has no such number, or one of other images.
    """
    found = measured_in(group, metric, level)
    values: dict[Any, list[float]] = {}
    for run, one in found:
        values.setdefault(run.settings.get(SEED), []).append(one.value)
    if len(values) < len(seeds_of(group)) or len({_measured_on(run, one) for run, one in found}) > 1:
        return None
    if len(values) < 2:
        return found[0][1]
    return Measurement.of(metric, found[0][1].name, interval_of_mean([*map(fmean, values.values())], "seeds"))


def measured_in(group: Sequence[Candidate], metric: str, level: str) -> list[tuple[Candidate, Measurement]]:
    """The measurements of a metric at a level in the runs of a group."""
    return [(run, one) for run in group for one in run.trained() if one.metric == metric and one.name.level == level]


def seeds_of(group: Sequence[Candidate]) -> list[Any]:
    """The seeds of a group, each once."""
    return list(dict.fromkeys(run.settings.get(SEED) for run in group))


def curve(run: Candidate, key: str, *, seconds: bool) -> list[tuple[float, float]]:
    """Points of a logged number, over seconds of training or images seen."""
    batch = int(run.settings.get("data.batch_size", 1))
    return [
        (spent if seconds else row["step"] * batch, row[key])
        for row, spent in training_seconds(run.rows)
        if row.get(key) is not None
    ]


def _measured_on(run: Candidate, one: Measurement) -> tuple[object, ...]:
    """Images and changes that a number is of."""
    samples = (run.results.about.get(key) for key in ("test_samples", "train_samples"))
    return (*samples, one.n, *(one.details.get(key) for key in ("corruptions", "severities")))


def _asked(run: Candidate) -> dict[str, Any]:
    """Settings of a run without those that `run.train_time` measured, which are others for every seed."""
    if run.settings.get("run.train_time") is None:
        return run.settings
    named = any("warmup_steps" in sitting["command"] for sitting in run.settings.get("provenance", []))
    measured = ("run.steps",) if named else ("run.steps", _WARMUP)
    return {key: value for key, value in run.settings.items() if key not in measured}


def _leading(keys: Sequence[str], runs: Sequence[Candidate]) -> list[str]:
    """Settings that are needed to tell groups apart: one that goes along with an earlier one adds nothing."""
    chosen: list[str] = []
    parts = 1
    for key in keys:
        trial = [*chosen, key]
        split = {tuple(str(run.settings.get(one, "-")) for one in trial) for run in runs}
        if len(split) > parts:
            chosen, parts = trial, len(split)
    return chosen


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
