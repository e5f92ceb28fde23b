"""Compare runs: Markdown on the terminal, a page, JSON."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from hjepa_benchmark import charts
from hjepa_benchmark.comparison.compare import (
    SEED,
    Candidate,
    Difference,
    curve,
    differing_settings,
    group_by_settings,
    group_interval,
    measured_in,
    paired_differences,
    read_candidates,
    seeds_of,
)
from hjepa_benchmark.runs import finished_steps, measured_by, open_data, read_config
from hjepa_benchmark.suite.findings import find
from hjepa_benchmark.suite.report import changed, copyable, error_panels, numbers_table
from hjepa_benchmark.suite.run import FOLDER, RESULTS_FILE, run_suite, weights_id
from hjepa_benchmark.suite.summary import TITLES, cell, markdown, summarize, title_of
from hjepa_eval import Measurement, read_results
from hjepa_eval.probes.whitening import KNN, WHITE_KNN
from hjepa_pretrain.model import load_run
from hjepa_pretrain.report.page import Section, code, page
from hjepa_pretrain.results import PIXELS, TRAINED, UNTRAINED

Table = tuple[list[str], list[list[str]]]
Groups = Mapping[str, Sequence[Candidate]]


def compare_runs(folders: Sequence[Path], *, suite: str = "quick", page: Path | None, output: Path | None) -> None:
    """Put runs side by side; a run without results is measured first.

    Args:
        folders: of finished runs; differences are to the first.
        suite: quick or full, for those that are to be measured.
        page: also write an HTML file.
        output: also write a JSON file.

    Raises:
        ValueError: there are fewer than two, or one is no finished run.
    """
    if len(folders) < 2:
        raise ValueError(f"RUN_DIR={', '.join(map(str, folders))}: a comparison needs two runs and more")
    measure_missing(folders, suite)
    runs = read_candidates(folders)
    groups = group_by_settings(runs)
    several = any(len(seeds_of(group)) > 1 for group in groups.values())
    show(runs, groups=groups if several else {}, page_file=page, output=output)


def show(runs: list[Candidate], *, groups: Groups, page_file: Path | None, output: Path | None) -> None:
    """Print a comparison as Markdown, and write its page and its JSON.

    Args:
        runs: the candidates.
        groups: runs whose means over seeds are shown too, by what they have in common; none: no means.
        page_file: the page, or None.
        output: the JSON, or None.
    """
    metrics = _metrics(runs)
    accuracies = [
        metric for metric in metrics if metric.startswith((KNN, WHITE_KNN)) or metric in ("linear", "attentive_1")
    ]
    differences = paired_differences(runs, accuracies)
    tables: dict[str, Table] = {}
    if groups:
        tables["Over seeds"] = _groups(groups, metrics)
    tables |= {
        "Results": _results(runs, metrics),
        f"Difference to {runs[0].name}, same samples": _differences(differences),
        "Settings that differ": _settings(runs),
        "Cost": _cost(runs),
    }
    notes = [f"Frozen features. Of {runs[0].name}: {summarize(runs[0].results).note}.", _measured_on(runs)]
    notes += _notes(runs, differences)
    notes += _without_mean(groups, metrics)
    for title, (header, rows) in tables.items():
        if rows:
            print(f"\n{title}\n\n{markdown(header, rows, _names(title))}")
    print("".join(f"\n{note}\n" for note in notes), end="")
    if page_file is not None:
        _write_page(page_file, runs, tables, notes)
        print(f"\npage: {page_file}")
    if output is not None:
        content = {**_content(runs, differences, metrics), "groups": _group_numbers(groups, metrics)}
        output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def measure_missing(folders: Sequence[Path], suite: str) -> None:
    """Run the suite where a run has no results, those of other weights or settings, or of the quick suite for the full.

    Raises:
        ValueError: one is no finished run, or has no images to be measured on.
    """
    for folder in folders:
        read_config(folder)
        finished_steps(folder)
    found = {folder: why for folder in folders if (why := _missing(folder, suite))}
    # What is wrong with the last is told before hours are spent on the first.
    for folder in found:
        open_data(folder, read_config(folder))
    for folder, why in found.items():
        print(f"{folder}: {why}, measuring (suite={suite})", file=sys.stderr, flush=True)
        run_suite(folder, suite=suite, console=Console(stderr=True, soft_wrap=True))


def _missing(folder: Path, suite: str) -> str | None:
    if not (folder / FOLDER / RESULTS_FILE).is_file():
        return "no results yet"
    try:
        about = read_results(folder / FOLDER / RESULTS_FILE).about
    except ValueError:
        return "its results cannot be read"
    config = read_config(folder)
    if about.get("weights") != weights_id(load_run(folder, config)):
        return "its results are of other weights"
    # What an option of the suite named in their place may differ from the run's own; earlier versions kept k alone.
    own = {key: value for key, value in measured_by(config).items() if key not in str(about.get("given", "")).split()}
    others = [f"{key}={about[key]}, not {value}" for key, value in own.items() if about.get(key, value) != value]
    if others:
        return f"its results are of other settings ({'; '.join(others)})"
    return "its results are of the quick suite" if (suite, about.get("suite")) == ("full", "quick") else None


def _metrics(runs: Sequence[Candidate]) -> list[str]:
    seen = dict.fromkeys(one.metric for run in runs for one in run.trained())
    own = {f"{start}{run.results.about.get('k')}" for run in runs for start in (KNN, WHITE_KNN)}
    return [*(metric for metric in seen if metric in own), *(metric for metric in TITLES if metric in seen)]


def _results(runs: Sequence[Candidate], metrics: Sequence[str]) -> Table:
    rows = []
    for run in runs:
        names = [one.name for one in run.trained() if one.metric in ("linear", "rankme")]
        for name in dict.fromkeys(names):
            rows.append([run.name, name.level, name.pooling, *_cells(run, TRAINED, name.level, metrics)])
    for subject, level, pooling in ((UNTRAINED, "encoder", "mean"), (PIXELS, "pixels", "flatten")):
        cells = _cells(runs[0], subject, level, metrics)
        rows.append([f"{subject} ({runs[0].name})", level, pooling, *cells])
    return ["run", "level", "pooling", *map(title_of, metrics)], rows


def _cells(run: Candidate, subject: str, level: str, metrics: Sequence[str]) -> list[str]:
    return [cell(find(run.results.measurements, metric, subject=subject, level=level)) for metric in metrics]


def _group_levels(group: Sequence[Candidate]) -> list[str]:
    return list(
        dict.fromkeys(one.name.level for run in group for one in run.trained() if one.metric in ("linear", "rankme"))
    )


def _groups(groups: Groups, metrics: Sequence[str]) -> Table:
    rows = []
    for label, group in groups.items():
        for level in _group_levels(group):
            cells = [cell(group_interval(group, metric, level)) for metric in metrics]
            rows.append([label, str(len(seeds_of(group))), level, *cells])
    return ["settings", "seeds", "level", *map(title_of, metrics)], rows


def _group_numbers(groups: Groups, metrics: Sequence[str]) -> list[dict[str, Any]]:
    """The same for JSON: a mean over seeds with its interval, or the only run's number with its own."""
    return [
        {
            "settings": label,
            "seeds": seeds_of(group),
            "results": [
                {"metric": metric, "level": level, **_numbers(one)}
                for level in _group_levels(group)
                for metric in metrics
                if (one := group_interval(group, metric, level)) is not None
            ],
        }
        for label, group in groups.items()
    ]


def _without_mean(groups: Groups, metrics: Sequence[str]) -> list[str]:
    """Say of what there is no mean over seeds, though some have it."""
    names = [
        title_of(metric)
        for metric in metrics
        if any(
            measured_in(group, metric, level) and group_interval(group, metric, level) is None
            for group in groups.values()
            for level in _group_levels(group)
        )
    ]
    if not names:
        return []
    return [
        f"Over seeds, {', '.join(names)} has no mean where a seed lacks it, or has it of other images or changes; to "
        "measure runs alike: hjepa-benchmark suite RUN_DIR, with the same options for each."
    ]


def _differences(differences: Sequence[Difference]) -> Table:
    rows = [
        [
            one.run, one.level, title_of(one.metric), f"{one.interval.value:+.3f}",
            f"{one.interval.low:+.3f} to {one.interval.high:+.3f}",
            "yes" if one.interval.low > 0 or one.interval.high < 0 else "no", str(one.interval.n),
        ]
        for one in differences
    ]  # fmt: skip
    return ["run", "level", "metric", "difference", "95 % interval", "without 0", "n"], rows


def _measured_on(runs: Sequence[Candidate]) -> str:
    """Say what held-out images the numbers are of."""
    names: dict[str, list[str]] = {}
    for run in runs:
        names.setdefault(run.results.data, []).append(run.name)
    told = [f"{data} ({', '.join(of)})" for data, of in names.items()]
    return f"Measured on {'; '.join(told)}."


def _notes(runs: Sequence[Candidate], differences: Sequence[Difference]) -> list[str]:
    """What a reader of the tables must know."""
    notes = []
    if differences:
        notes.append(
            "Intervals of differences are over the held-out images, for these very weights: another seed may differ by "
            "more, which sweep run.seed=0,1,2 tells."
        )
    found = {one.run for one in differences}
    for key, of in (("test_samples", "tested on other images"), ("train_samples", "probes learned from other images")):
        others = [run.name for run in runs[1:] if run.results.about.get(key) != runs[0].results.about.get(key)]
        if others:
            less = "; no paired difference" if not found.intersection(others) else ""
            notes.append(f"{', '.join(others)}: {of} than {runs[0].name}{less}. Do not compare the numbers.")
    others = [run.name for run in runs[1:] if _other_budget(run, runs[0])]
    if others:
        notes.append(
            f"{', '.join(others)}: trained neither on as many images nor for as long as {runs[0].name}, see the costs: "
            "a difference may be that of the budget."
        )
    changes = {run.name: over for run in runs if (over := _changes_of_mce(run))}
    first = next(iter(changes), "")
    others = [name for name in changes if changes[name] != changes[first]]
    if others:
        notes.append(
            f"mCE is over {'; '.join(f'{over} in {name}' for name, over in changes.items())}. Do not compare it, nor "
            f"what is added by corruptions, of {', '.join(others)} with that of {first}; to measure them alike: "
            "hjepa-benchmark suite RUN_DIR, with the same --suite and --corruption-images for each."
        )
    if any(key in ("model", SEED) or key.startswith("hjepa.encoder.") for key in differing_settings(runs)):
        notes.append("mCE is over the untrained encoder of each run, which another encoder or seed makes another one.")
    return notes


def _other_budget(run: Candidate, first: Candidate) -> bool:
    """Whether images seen and seconds of training both differ by more than a tenth: runs may be equal in either."""
    costs = [(run.results.about.get(key), first.results.about.get(key)) for key in ("images_seen", "training_seconds")]
    known = [(float(own), float(other)) for own, other in costs if own is not None and other is not None]
    return bool(known) and all(abs(own - other) > 0.1 * max(own, other) for own, other in known)


def _changes_of_mce(run: Candidate) -> str:
    """Say how many corruptions, severities and images the mCE of a run is over; nothing where it has none."""
    one = next((one for one in run.trained() if one.metric == "mce"), None)
    if one is None:
        return ""
    corruptions, severities = (one.details.get(key, "?") for key in ("corruptions", "severities"))
    return f"{corruptions} corruptions at {severities} severities of {one.n:,} images"


def _settings(runs: Sequence[Candidate]) -> Table:
    return ["setting", *(run.name for run in runs)], [[key, *row] for key, row in differing_settings(runs).items()]


def _cost(runs: Sequence[Candidate]) -> Table:
    rows = []
    for run in runs:
        about = run.results.about
        images, seconds = about.get("images_seen"), about.get("training_seconds")
        rows.append(
            [
                run.name, str(about.get("recipe", "-")),
                "-" if images is None else f"{images:,}",
                "-" if seconds is None else f"{seconds:,.0f}",
                "-" if not images or not seconds else f"{float(images) / float(seconds):,.0f}",
            ]
        )  # fmt: skip
    return ["run", "recipe", "images seen", "training seconds", "images/s"], rows


def _names(title: str) -> int:
    return 1 if title.startswith("Settings") else 2 if title == "Cost" else 3


def _write_page(path: Path, runs: Sequence[Candidate], tables: dict[str, Table], notes: Sequence[str]) -> None:
    sections = []
    for title, (header, rows) in tables.items():
        body = (
            numbers_table(header, rows) + copyable(header, rows, _names(title)) if rows else "<p class=note>None.</p>"
        )
        note = ""
        if title == "Results":
            body += charts.row(_figures(runs))
            note = " ".join(notes)
        sections.append(Section(title=title, note=note, body=body))
    commands = "\n".join(f"{run.name}: {run.results.about.get('command')}" for run in runs)
    sections.append(Section(title="Commands", body=code(commands)))
    text = page("Comparison", " · ".join(run.name for run in runs), sections)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, "utf-8")
    temporary.replace(path)


def _figures(runs: Sequence[Candidate]) -> list[str]:
    drawn = []
    keys = dict.fromkeys(key for run in runs for row in run.rows for key in row if key.startswith("eval/encoder/knn_"))
    for key in keys:
        for seconds, across in ((False, "images seen"), (True, "seconds of training")):
            logged = {run.name: curve(run, key, seconds=seconds) for run in runs}
            logged = {name: points for name, points in logged.items() if points}
            if logged:
                drawn.append(charts.progress(logged, across, f"kNN on the way, encoder, k={key.rpartition('_')[2]}"))
    labelled = [(run.name, one) for run in runs for one in changed(run.trained()) if one.name.level == "encoder"]
    if labelled:
        names = [run.name for run in runs]
        drawn.append(charts.lines(error_panels(labelled), "strength", "error, encoder", order=names))
    return drawn


def _content(runs: Sequence[Candidate], differences: Sequence[Difference], metrics: Sequence[str]) -> dict[str, Any]:
    return {
        "runs": [
            {
                "name": run.name,
                "data": run.results.data,
                "about": dict(run.results.about),
                "results": [
                    {
                        "metric": one.metric,
                        "branch": one.name.branch,
                        "level": one.name.level,
                        "pooling": one.name.pooling,
                        **_numbers(one),
                    }
                    for one in run.trained()
                    if one.metric in metrics
                ],
            }
            for run in runs
        ],
        "settings": differing_settings(runs),
        "differences": [asdict(one) for one in differences],
    }


def _numbers(one: Measurement) -> dict[str, float | None]:
    return {"value": _finite(one.value), "low": _finite(one.low), "high": _finite(one.high), "n": one.n}


def _finite(value: float) -> float | None:
    """JSON knows no NaN."""
    return value if math.isfinite(value) else None
