"""The page of a suite: one HTML file that opens offline."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from hjepa_benchmark import charts
from hjepa_benchmark.runs import Run, read_rows
from hjepa_benchmark.suite.findings import Findings, find, known
from hjepa_benchmark.suite.subjects import BRANCHES, PIXELS, TRAINED, UNTRAINED
from hjepa_benchmark.suite.summary import NAMES, latex, markdown, summarize
from hjepa_eval import Measurement, Results
from hjepa_eval.robustness.severity import Corruption
from hjepa_pretrain import settings
from hjepa_pretrain.evaluation import Images
from hjepa_pretrain.model import Model
from hjepa_pretrain.report.page import Section, code, notice, page, table
from hjepa_pretrain.report.write import feature_section, loss_section, neighbour_section, rank_section

_CLASSES = 25


@dataclass(kw_only=True, slots=True)
class Pictures:
    """What the page shows beside numbers.

    Attributes:
        trained: the trained model.
        shown: held-out images.
        attention: what each of their patches receives in the last block [n, heads, rows, columns].
    """

    trained: Model
    shown: Images
    attention: Tensor


def write_page(path: Path, run: Run, results: Results, findings: Findings, pictures: Pictures) -> None:
    """Write the page, whole or not at all.

    Args:
        path: the file.
        run: what was measured.
        results: its numbers.
        findings: the same, with the classes that the probes gave.
        pictures: what is shown beside them.
    """
    model = pictures.trained
    measured, rows = findings.measurements, read_rows(run.folder)
    train, test = run.train, run.test
    sections = [
        _summary(results),
        _accuracies(measured),
        _curves(measured, [str(name) for name in Corruption], "Corruptions", "severity"),
        _curves(measured, ["rotation", "occlusion", "resolution"], "Shifts", "strength"),
        _confusion(run, findings),
        *_composites(measured),
        _alike(measured),
        *([loss_section(rows), rank_section(rows)] if rows else []),
        feature_section(run.config, model, test),
        _attention(pictures),
        neighbour_section(run.config, model, train, test),
        _numbers(measured),
        _about(run, results),
    ]
    text = page(
        f"{run.name}: {results.about.get('suite')} benchmark",
        f"{run.config.recipe}, {run.config.model}, {run.config.run.steps:,} steps of {run.config.data.batch_size} "
        f"images; measured on {results.data}",
        [section for section in sections if section is not None],
    )
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, "utf-8")
    temporary.replace(path)


def numbers_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, own: Sequence[bool] = ()) -> str:
    """Return an HTML table with each interval small below its number."""
    return re.sub(r"(\S) (\[[^\]<]*\])</td>", r"\1<br><small>\2</small></td>", table(header, rows, own=own))


def copyable(header: Sequence[str], rows: Sequence[Sequence[str]], names: int) -> str:
    """Return a table as Markdown and LaTeX, folded away."""
    parts = (("Markdown", markdown(header, rows, names)), ("LaTeX (booktabs)", latex(header, rows, names)))
    return "".join(f"<details><summary>{title}</summary>{code(text)}</details>" for title, text in parts)


def _summary(results: Results) -> Section:
    summary = summarize(results)
    alarms = [
        f"{row[0]} {row[1]}"
        for row, own in zip(summary.rows, summary.trained, strict=True)
        if own and row[-1] == "collapsed"
    ]
    reasons = [
        f"{one.name.level}: {one.details['reasons']}"
        for one in results.measurements
        if one.metric == "effective_rank" and one.name.branch == BRANCHES[TRAINED] and one.details.get("reasons")
    ]
    said = f"Collapsed: {', '.join(alarms)}." if alarms else "No level has collapsed."
    body = numbers_table(summary.header, summary.rows, own=summary.trained)
    body += copyable(summary.header, summary.rows, len(NAMES)) + notice(
        f"{said} {'; '.join(reasons)}", alarm=bool(alarms)
    )
    return Section(title="Summary", note=f"Frozen features; {summary.note}.", body=body)


def _accuracies(measured: list[Measurement]) -> Section:
    levels = list(dict.fromkeys(one.name.level for one in measured if one.metric == "linear"))
    knn = next((one.metric for one in measured if one.metric.startswith("knn_")), None)
    drawn = []
    for metric, title in ((knn, f"kNN accuracy, k={(knn or '')[4:]}"), ("linear", "linear accuracy")):
        if metric is not None:
            series = {
                name: [find(measured, metric, branch=branch, level=level) for level in levels]
                for name, branch in BRANCHES.items()
            }
            drawn.append(charts.bars(levels, series, title))
    shots = list(dict.fromkeys(one.metric for one in measured if one.metric.startswith("few_shot_")))
    if shots:
        rows = {TRAINED: "encoder", UNTRAINED: "encoder", PIXELS: "pixels"}
        series = {
            name: [find(measured, metric, branch=BRANCHES[name], level=level) for metric in shots]
            for name, level in rows.items()
        }
        drawn.append(charts.bars([metric.removeprefix("few_shot_") for metric in shots], series, "few-shot accuracy"))
    note = "Bars are 95 % intervals: bootstrap over held-out images, over draws of the labels for few-shot accuracy."
    return Section(title="Accuracy by level", note=note, pictures=drawn)


def _curves(measured: list[Measurement], names: list[str], title: str, across: str) -> Section | None:
    by_branch = {branch: name for name, branch in BRANCHES.items()}
    panels: dict[str, dict[str, list[tuple[float, Measurement]]]] = {}
    for one in measured:
        kind, _, rest = one.metric.partition("/")
        name, _, strength = rest.partition("/")
        if kind == "error" and name in names:
            label = _series(one, by_branch)
            line = panels.setdefault(name.replace("_", " "), {}).setdefault(label, [])
            line.append((float(strength), one))
    if not panels:
        return None
    for series in panels.values():
        for points in series.values():
            points.sort(key=lambda point: point[0])
    clean = [one for one in measured if one.metric == "error/clean"]
    note = "Top-1 error of the logistic probes, which were fitted on clean images"
    if clean:
        note += f", on {clean[0].n} held-out images; without change: " + ", ".join(
            f"{_series(one, by_branch)} {one.value:.3f}" for one in clean
        )
    return Section(title=title, note=note + ".", pictures=[charts.lines(panels, across, "error")])


def _series(one: Measurement, by_branch: dict[str, str]) -> str:
    subject = by_branch.get(one.name.branch, one.name.branch)
    return subject if one.name.level == subject else f"{subject} {one.name.level}"


def _confusion(run: Run, findings: Findings) -> Section | None:
    truth = known(run.test).labels
    predicted = findings.predicted.get((TRAINED, "encoder"))
    classes = int(truth.max()) + 1
    if predicted is None or classes > _CLASSES:
        return None
    counts = np.zeros((classes, classes))
    np.add.at(counts, (truth.numpy(), predicted.clamp_max(classes - 1).numpy()), 1)
    shares = counts / np.maximum(1, counts.sum(1, keepdims=True))
    names = [run.class_name(label) for label in range(classes)]
    note = "Rows: class of the held-out image; columns: what the logistic probe of the trained encoder says, percent."
    return Section(title="Confusion", note=note, pictures=[charts.matrix(shares, names, names, "", percent=True)])


def _composites(measured: list[Measurement]) -> list[Section]:
    factors = list(dict.fromkeys(one.metric for one in measured if one.metric.startswith("factor/")))
    if not factors:
        return []
    names = list(dict.fromkeys((one.name.branch, one.name.level) for one in measured if one.metric == factors[0]))
    by_branch = {branch: name for name, branch in BRANCHES.items()}
    values = np.full((len(names), len(factors)), np.nan)
    for row, (branch, level) in enumerate(names):
        for column, metric in enumerate(factors):
            one = find(measured, metric, branch=branch, level=level)
            values[row, column] = np.nan if one is None else max(0.0, one.value)
    rows = [f"{by_branch.get(branch, branch)} {level}" for branch, level in names]
    columns = [metric.removeprefix("factor/") for metric in factors]
    note = (
        "Composites of garments on photographs, of which everything is known. Accuracy of a logistic probe for class "
        "and background, R² of ridge regression (below 0 shown as 0) for the rest; held-out garments and photographs."
    )
    pictures = [charts.matrix(values, rows, columns, "what can be read off")]
    widths: dict[str, list[tuple[float, Measurement]]] = {}
    for one in measured:
        if one.metric.startswith("width/") and one.name.branch == BRANCHES[TRAINED]:
            widths.setdefault(f"level {one.name.level}", []).append((float(one.metric.removeprefix("width/")), one))
    if widths:
        pictures.append(charts.lines({"class behind a bottleneck": widths}, "principal components", "accuracy"))
    iou = [one for one in measured if one.metric == "miou"]
    if iou:
        levels = list(dict.fromkeys(one.name.level for one in iou))
        series = {
            name: [find(iou, "miou", branch=BRANCHES[name], level=level) for level in levels]
            for name in (TRAINED, UNTRAINED)
        }
        pictures.append(charts.bars(levels, series, "segmentation, mean IoU"))
    return [Section(title="What each level keeps", note=note, pictures=pictures)]


def _alike(measured: list[Measurement]) -> Section | None:
    pairs = [one for one in measured if one.metric == "cka" and one.name.branch == BRANCHES[TRAINED]]
    if not pairs:
        return None
    names = list(dict.fromkeys(name for one in pairs for name in reversed(one.name.level.split(" - "))))
    values = np.eye(len(names))
    for one in pairs:
        first, second = (names.index(name) for name in one.name.level.split(" - "))
        values[first, second] = values[second, first] = one.value
    note = "Linear CKA of the training features: 1 where two levels hold the same, up to rotation and scale."
    return Section(title="How alike the levels are", note=note, pictures=[charts.matrix(values, names, names, "")])


def _attention(pictures: Pictures) -> Section:
    images = pictures.shown.pixels.permute(0, 2, 3, 1).numpy()
    note = "Attention that each patch receives from all patches in the last block of the target encoder."
    return Section(title="Attention", note=note, pictures=[charts.attention(images, pictures.attention.numpy())])


def _numbers(measured: list[Measurement]) -> Section:
    header = ["metric", "branch", "level", "value", "95 % interval", "over", "n train", "n"]
    rows = [
        [
            one.metric, one.name.branch, one.name.level, f"{one.value:.4g}",
            f"{one.low:.4g} to {one.high:.4g}" if np.isfinite(one.low) else "-", one.method,
            "-" if one.n_train is None else str(one.n_train), str(one.n),
        ]
        for one in measured
    ]  # fmt: skip
    body = f"<details><summary>{len(rows)} numbers</summary>{table(header, rows)}</details>"
    return Section(title="Every number", note="The same as in results.json.", body=body)


def _about(run: Run, results: Results) -> Section:
    facts = "\n".join(f"{key}: {value}" for key, value in results.about.items())
    config = (run.folder / settings.CONFIG_FILE).read_text()
    body = code(facts) + f"<details><summary>{settings.CONFIG_FILE} of the run</summary>{code(config)}</details>"
    return Section(title="Command, versions, configuration", body=body)
