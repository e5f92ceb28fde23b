"""The summary of a suite: one row a level, for the terminal, the page, Markdown and LaTeX."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.table import Table

from hjepa_benchmark.suite.findings import find
from hjepa_benchmark.suite.subjects import BRANCHES, TRAINED
from hjepa_eval import Measurement, Results

NAMES = ("features", "level", "pooling")


@dataclass(kw_only=True, slots=True)
class Summary:
    """Cells of the summary.

    Attributes:
        header: names of the columns.
        rows: cells.
        trained: which rows are of the trained model.
        note: what the columns are.
    """

    header: list[str]
    rows: list[list[str]]
    trained: list[bool]
    note: str


def cell(one: Measurement | None) -> str:
    """A number with its interval."""
    if one is None or not math.isfinite(one.value):
        return "-"
    digits = 1 if abs(one.value) >= 10 else 3
    text = f"{one.value:.{digits}f}"
    if math.isfinite(one.low) and math.isfinite(one.high):
        text += f" [{one.low:.{digits}f}, {one.high:.{digits}f}]"
    return text


def short_cell(one: Measurement | None) -> str:
    """A number with half the width of its interval, for a terminal."""
    text = cell(one)
    if one is None or " [" not in text:
        return text
    digits = 1 if abs(one.value) >= 10 else 3
    return f"{one.value:.{digits}f}±{(one.high - one.low) / 2:.{digits}f}".replace("±0.", "±.")


def summarize(
    results: Results, cell: Callable[[Measurement | None], str] = cell, without: Sequence[str] = ()
) -> Summary:
    """Put the main numbers of every level side by side.

    Args:
        results: of a suite.
        cell: writes a number.
        without: metrics that are left out.
    """
    measured = list(results.measurements)
    knn = [name for name in dict.fromkeys(one.metric for one in measured) if name == f"knn_{results.about.get('k')}"]
    columns: list[tuple[str, str]] = [(metric, f"kNN k={metric[4:]}") for metric in knn]
    columns += [("linear", "linear"), ("few_shot_5-shot", "5-shot"), ("attentive_1", "attentive"), ("map", "mAP")]
    columns += [("miou", "mIoU"), ("rankme", "RankMe"), ("effective_rank", "eff. rank"), ("mce", "mCE")]
    there = {one.metric for one in measured}.difference(without)
    columns = [(metric, title) for metric, title in columns if metric in there]
    by_branch = {branch: name for name, branch in BRANCHES.items()}
    keys = dict.fromkeys((one.name.branch, one.name.level) for one in measured if one.metric in ("linear", "rankme"))
    rows = []
    for branch, level in keys:
        found = [find(measured, metric, branch=branch, level=level) for metric, _ in columns]
        pooling = next(one.name.pooling for one in measured if (one.name.branch, one.name.level) == (branch, level))
        names = [by_branch.get(branch, branch), level, pooling]
        rows.append([*names, *(cell(one) for one in found), _verdict(measured, branch, level)])
    linear = next((one for one in measured if one.metric == "linear"), None)
    note = "target branch, 95 % intervals in brackets"
    if linear is not None:
        note += f"; {linear.n_train} labelled training and {linear.n} held-out images"
    mce = next((one for one in measured if one.metric == "mce"), None)
    if mce is not None:
        note += (
            f"; mCE: errors under {mce.details['corruptions']} corruptions at {mce.details['severities']} severities "
            f"over those of the untrained encoder, {mce.n} images, lower is better"
        )
    header = [*NAMES, *(title for _, title in columns), "collapse"]
    return Summary(header=header, rows=rows, trained=[row[0] == TRAINED for row in rows], note=note)


def summary_table(results: Results) -> Table:
    """The summary for a terminal, intervals as half their width."""
    summary = summarize(results, short_cell, without=("effective_rank", "attentive_1", "map", "miou"))
    table = Table(
        title=f"{results.model} ({results.about.get('recipe', '-')}) on {results.data}",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        caption=summary.note.replace("in brackets", "after ±"),
        caption_justify="left",
    )
    # Narrow enough for 80 columns: names of branch and pooling stand on the page, a collapse is told beside the level.
    for column in ("features", "level", *summary.header[len(NAMES) : -1]):
        table.add_column(column, justify="left" if column in NAMES else "right", no_wrap=True)
    for row, own in zip(summary.rows, summary.trained, strict=True):
        level = row[1] if row[-1] in ("healthy", "-") else f"{row[1]} ({row[-1]})"
        table.add_row(row[0], level, *row[len(NAMES) : -1], style="bold" if own else None)
    return table


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], names: int = len(NAMES)) -> str:
    """A table as Markdown."""
    rule = ["---" if number < names else "---:" for number in range(len(header))]
    lines = [[text.replace("|", "\\|") for text in line] for line in (header, rule, *rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def latex(header: Sequence[str], rows: Sequence[Sequence[str]], names: int = len(NAMES)) -> str:
    """A table as LaTeX with booktabs; intervals become small."""

    def escaped(text: str) -> str:
        for sign in "&%_#":
            text = text.replace(sign, "\\" + sign)
        value, bracket, rest = text.partition(" [")
        return f"{value} {{\\scriptsize [{rest}}}" if bracket else value

    columns = "l" * names + "r" * (len(header) - names)
    body = "\n".join(" & ".join(map(escaped, row)) + " \\\\" for row in rows)
    head = " & ".join(map(escaped, header))
    return f"\\begin{{tabular}}{{{columns}}}\n\\toprule\n{head} \\\\\n\\midrule\n{body}\n\\bottomrule\n\\end{{tabular}}"


def _verdict(measured: Sequence[Measurement], branch: str, level: str) -> str:
    one = find(measured, "effective_rank", branch=branch, level=level)
    return "-" if one is None else str(one.details.get("verdict", "-"))
