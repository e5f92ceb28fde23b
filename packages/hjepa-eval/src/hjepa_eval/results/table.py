"""Many results as one table: a row for each features of each model, a column for each metric."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hjepa_eval.results.interval import Interval
from hjepa_eval.results.measurement import Measurement, Results

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(kw_only=True, slots=True)
class MergedTable:
    """Cells of a table.

    Attributes:
        header: Names of the columns.
        rows: Cells, one list a row.
    """

    header: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """As Markdown, without a newline at the end."""
        rule = ["---" if column in _NAMES else "---:" for column in self.header]
        lines = [self.header, rule, *self.rows]
        return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)

    def turned(self) -> "MergedTable":
        """Columns as rows: for few rows with many numbers."""
        header, *rows = ([*column] for column in zip(self.header, *self.rows, strict=True))
        return MergedTable(header=header, rows=rows)

    def rich(self, title: str = "") -> "Table":
        """As a table for the terminal."""
        from rich.box import SIMPLE_HEAD
        from rich.markup import escape
        from rich.table import Table

        table = Table(title=escape(title), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        for column in self.header:
            # What is too wide goes on below: names that are cut off tell no run from another.
            table.add_column(escape(column), justify="left" if column in _NAMES else "right", overflow="fold")
        for row in self.rows:
            table.add_row(*map(escape, row))
        return table


_NAMES = ("model", "data", "branch", "level", "pooling")


def merge(results: Sequence[Results], *, metrics: Sequence[str] = ()) -> MergedTable:
    """Merge results: each number with its interval and its n (training/test where something was learned).

    Args:
        results: Results of some files. The same metric of the same features twice is refused: which one would be shown?
        metrics: Columns, in this order; none: all, in the order in which they first appear.

    Returns:
        The table. A column whose numbers all have one n says it in its head, else each cell does. What was not measured
        is "-"; features of which nothing of it was measured have no row.

    Raises:
        ValueError: Where a number comes twice, or a metric is nowhere.
    """
    cells: dict[tuple[str, ...], dict[str, Measurement]] = {}
    seen: dict[str, None] = {}
    for one in results:
        for measurement in one.measurements:
            name = measurement.name
            key = (one.model, one.data, name.branch, name.level, name.pooling)
            row = cells.setdefault(key, {})
            if measurement.metric in row:
                raise ValueError(
                    f"metric={measurement.metric}: twice for model={one.model} data={one.data} {name}; give the runs "
                    "different names, or leave out one file"
                )
            row[measurement.metric] = measurement
            seen[measurement.metric] = None
    unknown = [metric for metric in metrics if metric not in seen]
    if unknown:
        raise ValueError(f"metrics={unknown}: not in these results; allowed: {', '.join(seen)}")
    columns = list(metrics) or list(seen)
    cells = {key: row for key, row in cells.items() if not row.keys().isdisjoint(columns)}
    counts = {metric: {_count(row[metric]) for row in cells.values() if metric in row} for metric in columns}
    header = [*_NAMES, *(f"{m} (n {next(iter(counts[m]))})" if len(counts[m]) == 1 else m for m in columns)]
    rows = [
        [*key, *(_cell(row.get(metric), len(counts[metric]) > 1) for metric in columns)] for key, row in cells.items()
    ]
    return MergedTable(header=header, rows=rows)


def plus_minus(one: Measurement | Interval | None) -> str:
    """A number with half the width of its interval, for a narrow table: 0.387±.015; "-" where there is none."""
    if one is None or not math.isfinite(one.value):
        return "-"
    digits = 1 if abs(one.value) >= 10 else 3
    half = (one.high - one.low) / 2
    return f"{one.value:.{digits}f}" + (f"±{half:.{digits}f}".replace("±0.", "±.") if math.isfinite(half) else "")


def _cell(one: Measurement | None, with_count: bool) -> str:
    if one is None:
        return "-"
    value = _number(one.value)
    if math.isfinite(one.low) and math.isfinite(one.high):
        value += f" [{_number(one.low)}, {_number(one.high)}]"
    return f"{value} (n {_count(one)})" if with_count else value


def _number(value: float) -> str:
    return "-" if not math.isfinite(value) else f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _count(one: Measurement) -> str:
    return str(one.n) if one.n_train is None else f"{one.n_train}/{one.n}"
