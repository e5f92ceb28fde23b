"""The summary of a suite: one row a level, for the terminal, the page, Markdown and LaTeX."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from hjepa_benchmark.suite.findings import find
from hjepa_eval import Measurement, Results, plus_minus
from hjepa_eval.probes.whitening import KNN, WHITE_KNN
from hjepa_pretrain.results import TRAINED, subject_of
from hjepa_pretrain.uncut import uncut

NAMES = ("features", "level", "pooling")
TITLES = {
    "linear": "linear",
    "few_shot_5-shot": "5-shot",
    "attentive_1": "attentive",
    "map": "mAP",
    "miou": "mIoU",
    "rankme": "RankMe",
    "mce": "mCE",
}
_LATEX = {
    **{sign: "\\" + sign for sign in "&%_#${}"},
    "\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "α": "$\\alpha$",
}  # fmt: skip


@dataclass(kw_only=True, slots=True)
class Summary:
    """Cells of the summary.

    Attributes:
        header: names of the columns.
        rows: cells.
        trained: which rows are of the trained model.
        verdicts: whether the features of a row have collapsed; "-" where nobody can tell.
        note: what the columns are.
    """

    header: list[str]
    rows: list[list[str]]
    trained: list[bool]
    verdicts: list[str]
    note: str


def title_of(metric: str) -> str:
    """What a metric is called in tables."""
    for start, title in ((KNN, "kNN k="), (WHITE_KNN, "whitened k=")):
        if metric.startswith(start):
            return title + metric.removeprefix(start)
    return TITLES.get(metric, metric)


def cell(one: Measurement | None) -> str:
    """A number with its interval."""
    if one is None or not math.isfinite(one.value):
        return "-"
    digits = 1 if abs(one.value) >= 10 else 3
    text = f"{one.value:.{digits}f}"
    if math.isfinite(one.low) and math.isfinite(one.high):
        text += f" [{one.low:.{digits}f}, {one.high:.{digits}f}]"
    return text


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
    there = {one.metric for one in measured}.difference(without)
    k = results.about.get("k")
    wanted = (f"{KNN}{k}", f"{WHITE_KNN}{k}", *TITLES)
    columns = [(metric, title_of(metric)) for metric in wanted if metric in there]
    names = [one.name for one in measured if one.metric in ("linear", "rankme")]
    poolings = {(subject_of(name.branch), name.level): name.pooling for name in names}
    rows, verdicts = [], []
    for (subject, level), pooling in poolings.items():
        found = [find(measured, metric, subject=subject, level=level) for metric, _ in columns]
        verdict = _verdict(measured, subject, level)
        verdicts.append(verdict)
        told = level if verdict in ("healthy", "-") else f"{level} ({verdict})"
        rows.append([subject, told, pooling, *(cell(one) for one in found)])
    linear = next((one for one in measured if one.metric == "linear"), None)
    note = "target branch" if results.about.get("target_encoder", True) else "the encoder, which has no moving average"
    note += ", 95 % intervals in brackets"
    if linear is not None:
        note += f"; {linear.n_train} labelled training and {linear.n} held-out images"
    for metric, title in columns:
        one = next(one for one in measured if one.metric == metric)
        if metric == "attentive_1":
            note += f", {title} of {one.n_train} training images"
        elif metric == "map":
            note += f", {title} of {one.n} queries"
        elif metric == "miou":
            note += f", {title} of {one.n} composites after {one.n_train}"
    mce = next((one for one in measured if one.metric == "mce"), None)
    if mce is not None:
        note += (
            f"; mCE: errors under {mce.details['corruptions']} corruptions at {mce.details['severities']} severities "
            f"over those of the untrained encoder, {mce.n} images, lower is better"
        )
        if why := mce.details.get("undefined"):
            note += f"; undefined: {why}"
    if left_out := results.about.get("left_out"):
        note += f"; left out {left_out}"
    header = [*NAMES, *(title for _, title in columns)]
    return Summary(header=header, rows=rows, trained=[row[0] == TRAINED for row in rows], verdicts=verdicts, note=note)


def summary_table(results: Results) -> Table:
    """The summary for a terminal, intervals as half their width."""
    white = f"{WHITE_KNN}{results.about.get('k')}"
    summary = summarize(results, plus_minus, without=(white, "attentive_1", "map", "miou"))
    table = Table(
        title=escape(f"{results.model} ({results.about.get('recipe', '-')}) on {results.data}"),
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        caption=summary.note.replace("in brackets", "after ±"),
        caption_justify="left",
    )
    # Narrow enough for 80 columns: the pooling stands on the page.
    for column in ("features", "level", *summary.header[len(NAMES) :]):
        table.add_column(column, justify="left" if column in NAMES else "right", no_wrap=True)
    for row, own in zip(summary.rows, summary.trained, strict=True):
        table.add_row(*row[:2], *row[len(NAMES) :], style="bold" if own else None)
    return uncut(table)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], names: int = len(NAMES)) -> str:
    """A table as Markdown."""
    rule = ["---" if number < names else "---:" for number in range(len(header))]
    lines = [[text.replace("|", "\\|") for text in line] for line in (header, rule, *rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def latex(header: Sequence[str], rows: Sequence[Sequence[str]], names: int = len(NAMES)) -> str:
    """A table as LaTeX with booktabs; intervals become small."""

    def escaped(text: str) -> str:
        text = "".join(_LATEX.get(sign, sign) for sign in text)
        value, bracket, rest = text.partition(" [")
        return f"{value} {{\\scriptsize [{rest}}}" if bracket else value

    columns = "l" * names + "r" * (len(header) - names)
    body = "\n".join(" & ".join(map(escaped, row)) + " \\\\" for row in rows)
    head = " & ".join(map(escaped, header))
    return f"\\begin{{tabular}}{{{columns}}}\n\\toprule\n{head} \\\\\n\\midrule\n{body}\n\\bottomrule\n\\end{{tabular}}"


def _verdict(measured: Sequence[Measurement], subject: str, level: str) -> str:
    one = find(measured, "effective_rank", subject=subject, level=level)
    return "-" if one is None else str(one.details.get("verdict", "-"))
