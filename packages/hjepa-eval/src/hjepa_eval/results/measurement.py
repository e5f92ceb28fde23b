"""Measured numbers and files of them."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, cast

from hjepa_eval.extraction.features import FeatureName
from hjepa_eval.results.interval import Interval
from hjepa_eval.results.schema import check, results_schema

Plain: TypeAlias = str | int | float | bool | None


@dataclass(kw_only=True, slots=True, frozen=True)
class Measurement:
    """A number with everything that it means.

    Attributes:
        metric: What it is: "knn_20", "linear", "rankme", ...
        name: Branch, level and pooling of the features.
        value: The number; NaN where it is not defined.
        n: Samples that it is of: test samples of an accuracy, samples of a rank.
        low: Lower end of the 95 % interval; NaN where there is none.
        high: Upper end.
        method: What the interval is over: bootstrap, seeds, draws, jackknife; none where there is none.
        n_train: Samples that were learned from; None where nothing was.
        details: What the measure chose or found beside.
    """

    metric: str
    name: FeatureName
    value: float
    n: int
    low: float = math.nan
    high: float = math.nan
    method: str = "none"
    n_train: int | None = None
    details: Mapping[str, Plain] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        metric: str,
        name: FeatureName,
        interval: Interval,
        *,
        n: int | None = None,
        n_train: int | None = None,
        details: Mapping[str, Plain] | None = None,
    ) -> "Measurement":
        """Make a measurement of an interval; n is the interval's own unless given."""
        return cls(
            metric=metric,
            name=name,
            value=interval.value,
            n=interval.n if n is None else n,
            low=interval.low,
            high=interval.high,
            method=interval.method,
            n_train=n_train,
            details={} if details is None else details,
        )


@dataclass(kw_only=True, slots=True, frozen=True)
class Results:
    """What was measured on one model and one data set.

    Attributes:
        model: What was measured: a run, a timm name, "pixels".
        data: What it was measured on.
        measurements: The numbers.
        about: Whatever makes them reproducible: command, versions, seed.
    """

    model: str
    data: str
    measurements: Sequence[Measurement]
    about: Mapping[str, Plain] = field(default_factory=dict)


def to_json(results: Results) -> dict[str, Any]:
    """Results as plain JSON content, checked against the schema.

    Args:
        results: The results.

    Returns:
        The content; numbers that are not finite are null.

    Raises:
        ValueError: Where a name is empty, a count is below 1 or a method is unknown.
    """
    content = {
        "schema": results_schema()["properties"]["schema"]["const"],
        "model": results.model,
        "data": results.data,
        "about": {key: _plain(value) for key, value in results.about.items()},
        "measurements": [
            {
                "metric": one.metric,
                "value": _plain(one.value),
                "low": _plain(one.low),
                "high": _plain(one.high),
                "method": one.method,
                "n": one.n,
                "n_train": one.n_train,
                "branch": one.name.branch,
                "level": one.name.level,
                "pooling": one.name.pooling,
                "details": {key: _plain(value) for key, value in one.details.items()},
            }
            for one in results.measurements
        ],
    }
    check(content, results_schema())
    return content


def from_json(content: object) -> Results:
    """Results of JSON content.

    Args:
        content: What json gives.

    Returns:
        The results.

    Raises:
        ValueError: Where the content does not follow the schema.
    """
    check(content, results_schema())
    content = cast("dict[str, Any]", content)
    return Results(
        model=content["model"],
        data=content["data"],
        about=content.get("about", {}),
        measurements=[
            Measurement(
                metric=one["metric"],
                name=FeatureName(branch=one["branch"], level=one["level"], pooling=one["pooling"]),
                value=_number(one["value"]),
                low=_number(one["low"]),
                high=_number(one["high"]),
                method=one["method"],
                n=one["n"],
                n_train=one.get("n_train"),
                details=one.get("details", {}),
            )
            for one in content["measurements"]
        ],
    )


def write_results(results: Results, path: Path | str) -> None:
    """Write a results file, whole or not at all.

    Args:
        results: The results.
        path: The file; one that is there is replaced.

    Raises:
        ValueError: Where the results do not follow the schema; nothing is written then.
    """
    text = json.dumps(to_json(results), indent=1, allow_nan=False) + "\n"
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, "utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_results(path: Path | str) -> Results:
    """Read a results file.

    Args:
        path: The file.

    Returns:
        The results.

    Raises:
        ValueError: One line with the path, where it is no JSON or does not follow the schema.
    """
    try:
        return from_json(json.loads(Path(path).read_text("utf-8")))
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: no results of hjepa-eval: {reason}") from None


def _plain(value: Plain) -> Plain:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
