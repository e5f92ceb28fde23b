"""The page of a suite: one HTML file that opens offline."""

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hjepa_benchmark import charts
from hjepa_benchmark.runs import Run
from hjepa_benchmark.suite.findings import Findings, find, known
from hjepa_benchmark.suite.subjects import SUBJECTS
from hjepa_benchmark.suite.summary import NAMES, cell, latex, markdown, summarize
from hjepa_eval import Measurement, Results
from hjepa_eval.probes.whitening import KNN, WHITE_KNN
from hjepa_eval.robustness.severity import Corruption
from hjepa_pretrain import settings
from hjepa_pretrain.evaluation import Images
from hjepa_pretrain.model import Model
from hjepa_pretrain.report.page import Section, code, notice, page, table
from hjepa_pretrain.report.write import feature_section, loss_section, neighbour_section, rank_section, read_rows
from hjepa_pretrain.results import PIXELS, TRAINED, UNTRAINED, subject_of

_CLASSES = 25  # that a matrix shows legibly
_PAIRS = 20
_UNLABELLED = {
    "rankme": "RankMe", "effective_rank": "eff. rank", "alpha_req": "α-ReQ", "isotropy": "isotropy", "spread": "spread",
    "uniformity": "uniformity", "lidar": "LiDAR", "alignment": "alignment",
}  # fmt: skip
_DCI = {
    "dci_disentanglement": "disentanglement", "dci_mean_completeness": "completeness",
    "dci_error": "error (informativeness)",
}  # fmt: skip
_SHIFTS = {"rotation": "rotation, degrees", "occlusion": "occlusion, share", "resolution": "resolution, share"}


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
    measured, rows = findings.measurements, read_rows(run.folder, run.steps)
    train, test = run.train, run.test
    sections = [
        _summary(results),
        _accuracies(measured, results.about.get("k")),
        _unlabelled(measured),
        _corruptions(measured),
        _shifts(measured),
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
        f"{run.config.recipe}, {run.config.model}, {run.steps:,} steps of {run.config.data.batch_size} "
        f"images; measured on {results.data}",
        [section for section in sections if section is not None],
    )
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, "utf-8")
    temporary.replace(path)


def numbers_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, own: Sequence[bool] = ()) -> str:
    """Return an HTML table with each interval small below its number; it scrolls where the screen is narrow."""
    numbers = re.sub(r"(\S) (\[[^\]<]*\])</td>", r"\1<br><small>\2</small></td>", table(header, rows, own=own))
    return f'<div style="overflow-x:auto">{numbers}</div>'


def copyable(header: Sequence[str], rows: Sequence[Sequence[str]], names: int) -> str:
    """Return a table as Markdown and LaTeX, folded away."""
    parts = (("Markdown", markdown(header, rows, names)), ("LaTeX (booktabs)", latex(header, rows, names)))
    return "".join(f"<details><summary>{title}</summary>{code(text)}</details>" for title, text in parts)


def _summary(results: Results) -> Section:
    summary = summarize(results)
    verdicts = [verdict for verdict, own in zip(summary.verdicts, summary.trained, strict=True) if own]
    reasons = [
        f"{one.name.level}: {one.details['reasons']}"
        for one in results.measurements
        if one.metric == "effective_rank" and _subject(one) == TRAINED and one.details.get("reasons")
    ]
    said, alarm = "No level has collapsed.", False
    if "collapsed" in verdicts:
        said, alarm = f"{verdicts.count('collapsed')} of {len(verdicts)} levels have collapsed.", True
    elif "-" in verdicts:
        said, alarm = "Too few images to tell whether a level has collapsed.", True
    body = numbers_table(summary.header, summary.rows, own=summary.trained)
    body += copyable(summary.header, summary.rows, len(NAMES)) + notice(f"{said} {'; '.join(reasons)}", alarm=alarm)
    return Section(title="Summary", note=f"Frozen features; {summary.note}.", body=body)


def _accuracies(measured: list[Measurement], k: object) -> Section | None:
    levels = list(dict.fromkeys(one.name.level for one in measured if one.metric == "linear"))
    there = {one.metric for one in measured}
    drawn = []
    charted = (
        (f"{KNN}{k}", f"kNN accuracy, k={k}"),
        (f"{WHITE_KNN}{k}", f"kNN accuracy of whitened features, k={k}"),
        ("linear", "linear accuracy"),
    )
    for metric, title in charted:
        if metric in there:
            series = {
                name: [find(measured, metric, subject=name, level=level) for level in levels] for name in SUBJECTS
            }
            drawn.append(charts.bars(levels, series, "level", title))
    shots = list(dict.fromkeys(one.metric for one in measured if one.metric.startswith("few_shot_")))
    if shots:
        rows = {TRAINED: "encoder", UNTRAINED: "encoder", PIXELS: "pixels"}
        series = {
            name: [find(measured, metric, subject=name, level=level) for metric in shots]
            for name, level in rows.items()
        }
        names = [metric.removeprefix("few_shot_") for metric in shots]
        drawn.append(charts.bars(names, series, "labels", "few-shot accuracy"))
    dense = list(dict.fromkeys(one.name.level for one in measured if one.metric == "correspondence"))
    if dense:
        series = {
            name: [find(measured, "correspondence", subject=name, level=level) for level in dense]
            for name in (TRAINED, UNTRAINED)
        }
        drawn.append(charts.bars(dense, series, "level", "corresponding patches found"))
    if not drawn:
        return None
    note = "Whiskers are 95 % intervals: bootstrap over held-out images, Student's t over draws of the labels for "
    note += "few-shot accuracy, which is that of the encoder."
    if dense:
        note += " Corresponding patches: how often the nearest patch of another crop of an image shows the same place; "
        note += "by chance one time in as many as a level has patches."
    return Section(title="Accuracy by level", note=note, body=charts.row(drawn))


def _by_level(measured: list[Measurement], titles: Mapping[str, str]) -> str:
    """A table of some metrics, a row for each level that has the first of them."""
    shown = [metric for metric in titles if any(one.metric == metric and np.isfinite(one.value) for one in measured)]
    names = dict.fromkeys(
        (_subject(one), one.name.level, one.name.pooling) for one in measured if one.metric == shown[0]
    )
    rows = [
        [*name, *(cell(find(measured, metric, subject=name[0], level=name[1])) for metric in shown)] for name in names
    ]
    header = [*NAMES, *(titles[metric] for metric in shown)]
    return numbers_table(header, rows, own=[row[0] == TRAINED for row in rows]) + copyable(header, rows, len(NAMES))


def _unlabelled(measured: list[Measurement]) -> Section | None:
    first = next((one for one in measured if one.metric == "rankme"), None)
    if first is None:
        return None
    note = (
        f"What needs no label, of {first.n} training images; 95 % intervals of a jackknife. RankMe is uncentred, the "
        "effective rank centred; α-ReQ near 1 is the mark of a good spectrum."
    )
    lidar = next((one for one in measured if one.metric == "lidar"), None)
    if lidar is not None:
        note += f" LiDAR and alignment: {lidar.n} held-out images, {lidar.details['views']} crops of each."
    return Section(title="Without labels", note=note, body=_by_level(measured, _UNLABELLED))


def error_panels(labelled: Iterable[tuple[str, Measurement]]) -> dict[str, dict[str, list[tuple[float, Measurement]]]]:
    """Points (strength, error) by the label of a line, by the change of the images, corruptions first."""
    panels: dict[str, dict[str, list[tuple[float, Measurement]]]] = {}
    for label, one in sorted(labelled, key=lambda pair: float(pair[1].metric.rpartition("/")[2])):
        name = one.metric.split("/")[1].replace("_", " ")
        panels.setdefault(name, {}).setdefault(label, []).append((float(one.metric.rpartition("/")[2]), one))
    order = [*(name.replace("_", " ") for name in Corruption), *_SHIFTS]
    return {name: panels[name] for name in order if name in panels}


def changed(measured: Iterable[Measurement]) -> list[Measurement]:
    """Errors on changed images."""
    return [one for one in measured if one.metric.startswith("error/") and one.metric.count("/") == 2]


def _corruptions(measured: list[Measurement]) -> Section | None:
    found = error_panels(_labelled(measured))
    panels = {title: found[title] for name in Corruption if (title := name.replace("_", " ")) in found}
    if not panels:
        return None
    own = [one for one in measured if one.metric == "added_error"]
    titles = {"error/clean": "clean error", "added_error": "added error", "mce": "mCE", "relative_mce": "relative mCE"}
    body = charts.row([charts.lines(panels, "severity", "error")]) + _by_level(measured, titles)
    note = (
        f"Top-1 error of the logistic probes, which were fitted on clean images, on {own[0].n} held-out images. "
        "Added error: mean over corruptions and severities, less the error on clean images. mCE and relative mCE "
        "(Hendrycks and Dietterich 2019, section 4) are over the untrained encoder's, not over AlexNet's."
    )
    for metric, title in (("mce", "mCE"), ("relative_mce", "Relative mCE")):
        why = next((one.details.get("undefined") for one in measured if one.metric == metric), None)
        note += f" {title} is undefined: {why}." if why else ""
    return Section(title="Corruptions", note=note, body=body)


def _shifts(measured: list[Measurement]) -> Section | None:
    found = error_panels(_labelled(measured))
    panels = {title: found[name] for name, title in _SHIFTS.items() if name in found}
    if not panels:
        return None
    note = "Top-1 error of the same probes on the same images."
    return Section(title="Shifts", note=note, body=charts.row([charts.lines(panels, "", "error")]))


def _labelled(measured: list[Measurement]) -> list[tuple[str, Measurement]]:
    return [
        (one.name.level if _subject(one) == PIXELS else f"{_subject(one)} {one.name.level}", one)
        for one in changed(measured)
    ]


def _subject(one: Measurement) -> str:
    return subject_of(one.name.branch)


def _confusion(run: Run, findings: Findings) -> Section | None:
    truth, predicted = known(run.test).labels, findings.predicted.get((TRAINED, "encoder"))
    if predicted is None:
        return None
    classes = int(torch.maximum(truth.max(), predicted.max())) + 1
    names = [run.test.class_name(label) for label in range(classes)]
    if classes > _CLASSES:
        return _confused_most(truth, predicted, names)
    counts = np.zeros((classes, classes))
    np.add.at(counts, (truth.numpy(), predicted.numpy()), 1)
    shares = counts / np.maximum(1, counts.sum(1, keepdims=True))
    note = "Rows: class of the held-out image; columns: what the logistic probe of the trained encoder says, percent."
    drawn = charts.matrix(shares, names, names, "", percent=True)
    return Section(title="Confusion", note=note, body=charts.row([drawn]))


def _confused_most(truth: Tensor, predicted: Tensor, names: Sequence[str]) -> Section:
    """The pairs of classes of which the greatest share of the one is taken for the other."""
    wrong = truth != predicted
    if not bool(wrong.any()):
        return Section(title="Confusion", note=f"No image of the {len(names)} classes is taken for another class.")
    pairs, counts = torch.unique(torch.stack((truth, predicted))[:, wrong], dim=1, return_counts=True)
    of = truth.bincount()[pairs[0]]
    shares = counts / of
    rows = [
        [*(names[label] for label in pairs[:, at]), f"{100 * shares[at]:.0f} %", f"{counts[at]} of {of[at]}"]
        for at in shares.argsort(descending=True, stable=True)[:_PAIRS].tolist()
    ]
    note = (
        f"The {len(rows)} pairs of the {len(names)} classes that the logistic probe of the trained encoder confuses "
        "most: share of the held-out images of the one that it takes for the other."
    )
    return Section(title="Confusion", note=note, body=numbers_table(["class", "taken for", "share", "images"], rows))


def _composites(measured: list[Measurement]) -> list[Section]:
    factors = list(dict.fromkeys(one.metric for one in measured if one.metric.startswith("factor/")))
    if not factors:
        return []
    names = list(dict.fromkeys((_subject(one), one.name.level) for one in measured if one.metric == factors[0]))
    values = np.full((len(names), len(factors)), np.nan)
    for row, (subject, level) in enumerate(names):
        for column, metric in enumerate(factors):
            one = find(measured, metric, subject=subject, level=level)
            values[row, column] = np.nan if one is None else max(0.0, one.value)
    rows = [level if level == PIXELS else f"{subject} {level}" for subject, level in names]
    columns = [metric.removeprefix("factor/") for metric in factors]
    note = (
        "Composites of garments on photographs, of which everything is known. Accuracy of a logistic probe for class "
        "and background, R² of ridge regression (below 0 shown as 0) for the rest; held-out garments and photographs, "
        "for background other pictures of the same photographs."
    )
    pictures = [charts.matrix(values, rows, columns, "what can be read off")]
    widths: dict[str, list[tuple[float, Measurement]]] = {}
    for one in measured:
        if one.metric.startswith("width/") and _subject(one) == TRAINED:
            widths.setdefault(f"level {one.name.level}", []).append((float(one.metric.removeprefix("width/")), one))
    if widths:
        pictures.append(
            charts.lines({"class behind a bottleneck": widths}, "principal components", "accuracy", doubling=True)
        )
    iou = [one for one in measured if one.metric == "miou"]
    if iou:
        levels = list(dict.fromkeys(one.name.level for one in iou))
        series = {
            name: [find(iou, "miou", subject=name, level=level) for level in levels] for name in (TRAINED, UNTRAINED)
        }
        pictures.append(charts.bars(levels, series, "level", "segmentation, mean IoU"))
    body = charts.row(pictures)
    if any(one.metric in _DCI for one in measured):
        note += (
            " Below: disentanglement, completeness and informativeness of the dimensions (Eastwood and Williams 2018), "
            "whose error is 0 where they tell the factors and 1 where they tell nothing."
        )
        body += _by_level(measured, _DCI)
    return [Section(title="What each level keeps", note=note, body=body)]


def _alike(measured: list[Measurement]) -> Section | None:
    pairs = [one for one in measured if one.metric == "cka" and _subject(one) == TRAINED]
    if not pairs:
        return None
    names = list(dict.fromkeys(name for one in pairs for name in reversed(one.name.level.split(" - "))))
    values = np.eye(len(names))
    for one in pairs:
        first, second = (names.index(name) for name in one.name.level.split(" - "))
        values[first, second] = values[second, first] = one.value
    note = "Linear CKA of the training features: 1 where two levels hold the same, up to rotation and scale."
    return Section(
        title="How alike the levels are", note=note, body=charts.row([charts.matrix(values, names, names, "")])
    )


def _attention(pictures: Pictures) -> Section:
    images = pictures.shown.pixels.permute(0, 2, 3, 1).numpy()
    encoder = "target encoder" if getattr(pictures.trained, "target_encoder", None) is not None else "encoder"
    heads = pictures.attention.shape[1]
    note = f"Attention that each patch receives from all patches in the last block of the {encoder}, mean of its "
    note += f"{heads} heads and by head{'' if heads <= charts.HEADS else f', the first {charts.HEADS}'}."
    return Section(title="Attention", note=note, pictures=[charts.attention(images, pictures.attention.numpy())])


def _numbers(measured: list[Measurement]) -> Section:
    header = ["metric", "branch", "level", "pooling", "value", "95 % interval", "over", "n train", "n"]
    rows = [
        [
            one.metric, one.name.branch, one.name.level, one.name.pooling,
            f"{one.value:.4g}" if np.isfinite(one.value) else "undefined",
            f"{one.low:.4g} to {one.high:.4g}" if np.isfinite(one.low) else "-", one.method,
            "-" if one.n_train is None else str(one.n_train), str(one.n),
        ]
        for one in measured
    ]  # fmt: skip
    body = f"<details><summary>{len(rows)} numbers</summary>{numbers_table(header, rows)}</details>"
    return Section(title="Every number", note="The same as in results.json.", body=body)


def _about(run: Run, results: Results) -> Section:
    # A long list of versions would run out of the page; a command must stay in one piece to be copied.
    facts = "\n".join(
        textwrap.fill(f"{key}: {value}", 100, subsequent_indent="  ") if key == "versions" else f"{key}: {value}"
        for key, value in results.about.items()
    )
    config = (run.folder / settings.CONFIG_FILE).read_text(encoding="utf-8")
    body = code(facts) + f"<details><summary>{settings.CONFIG_FILE} of the run</summary>{code(config)}</details>"
    return Section(title="Command, versions, configuration", body=body)
