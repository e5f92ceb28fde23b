"""The suite: measure a run, keep the results, write the page."""

import errno
import importlib.metadata
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from torch import nn

from hjepa_benchmark.runs import Measured, Run, measured_by, open_run, training_seconds
from hjepa_benchmark.suite.composites import measure_composites
from hjepa_benchmark.suite.findings import Findings, images_hash, known, save_right
from hjepa_benchmark.suite.plan import PLANS, Plan
from hjepa_benchmark.suite.probes import (
    attention_of,
    compare_levels,
    compare_views,
    match_views,
    probe_levels,
    probe_tokens,
    rank_levels,
)
from hjepa_benchmark.suite.report import Pictures, write_page
from hjepa_benchmark.suite.robustness import check_folders, measure_folders, measure_robustness
from hjepa_benchmark.suite.subjects import subjects
from hjepa_benchmark.suite.summary import summary_table
from hjepa_eval import Results, weights_hash, write_results
from hjepa_pretrain import settings
from hjepa_pretrain.provenance import provenance
from hjepa_pretrain.report.write import read_rows

FOLDER, RESULTS_FILE, PAGE_FILE = "benchmark", "results.json", "report.html"
_ATTENTION_IMAGES = 8


def run_suite(
    folder: Path,
    measured: Measured | None = None,
    *,
    suite: str = "quick",
    corruption_images: int | None = None,
    folders: Sequence[str] = (),
    classes: Path | None = None,
    console: Console | None = None,
) -> Results:
    """Measure a run; write `benchmark/results.json`, `right.safetensors` and `report.html` into its folder.

    Args:
        folder: of a finished run.
        suite: quick or full.
        measured: images that are learned from, and those that are classified; None is all as in the run.
        corruption_images: held-out images that are changed; None leaves it to the suite.
        folders: NAME=PATH of folders of other images of the same classes.
        classes: file with the class folders of the training set, one a line, in the order of its labels.
        console: where the table goes.

    Returns:
        What stands in `results.json`.

    Raises:
        ValueError: the folder holds no finished run, or an argument is wrong.
    """
    plan = PLANS[suite]
    if corruption_images is not None:
        if corruption_images < 1:
            raise ValueError(f"--corruption-images={corruption_images}: too few; allowed: 1 and more")
        plan = replace(plan, corruption_images=corruption_images)
    others, names = _folders(folders, classes)
    run = open_run(folder, measured)
    if others:
        check_folders(others, names, run.train)
    target = folder / FOLDER
    target.mkdir(exist_ok=True)
    if not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, "cannot be written; measure a copy of the run", str(target))
    read_rows(folder, run.steps)  # damage is told now, and not when all has been measured
    began = time.monotonic()
    findings, pictures = measure(run, plan, others, names)
    about = _about(run, suite, pictures.trained, time.monotonic() - began)
    if measured is not None and (given := measured.given()):
        about["given"] = " ".join(given)
    if findings.left_out:
        about["left_out"] = findings.left_out
    results = Results(model=run.name, data=run.data, measurements=findings.measurements, about=about)
    save_right(findings.right, target)
    write_results(results, target / RESULTS_FILE)
    write_page(target / PAGE_FILE, run, results, findings, pictures)
    console = console or Console(soft_wrap=True)
    console.print(summary_table(results))
    console.print(f"results: {target / RESULTS_FILE}\nreport: {target / PAGE_FILE}", highlight=False, markup=False)
    return results


def measure(run: Run, plan: Plan, folders: dict[str, Path], classes: list[str]) -> tuple[Findings, Pictures]:
    """Measure the trained model, the untrained one and raw pixels.

    Args:
        run: what is measured, and on what.
        plan: how much.
        folders: other images of the same classes, by name.
        classes: the class folders of the training set.

    Returns:
        Numbers, and what the page shows beside them.
    """
    labelled = len(known(run.train).labels) > 1 and len(known(run.test).labels) > 0
    if not labelled:
        _tell("no labels: only what needs none; --train and --eval take shards with labels")
        if folders:
            raise ValueError(f"--folder {next(iter(folders))}: the run has no labels to learn classes from")
    findings, pairs = Findings(), []
    everyone = subjects(run)
    for subject in everyone:
        _tell(f"features and probes, {subject.name}")
        train, test = (subject.extract(images, run.device) for images in (run.train, run.test))
        if subject.model is not None:
            rank_levels(train, findings)
            compare_levels(train, findings)
            if plan.views:
                compare_views(subject, run, findings)
                match_views(subject, run, findings)
        if not labelled:
            continue
        pairs.append((subject, probe_levels(subject, train, test, run, plan, findings)))
        if subject.model is not None and plan.attentive:
            _tell(f"attentive probes, {subject.name}")
            probe_tokens(subject, run, plan.attentive, findings)
    if findings.left_out:
        _tell(f"left out {findings.left_out}")
    if labelled:
        measure_robustness(pairs, run, plan, findings, _tell)
    if folders:
        measure_folders(folders, classes, *pairs[0], run, findings)
    if plan.composites is not None:
        measure_composites(everyone, run, findings, _tell, plan.composites)
    shown = run.test.head(_ATTENTION_IMAGES)
    trained = everyone[0]
    assert trained.model is not None
    attention = attention_of(trained, run, shown.pixels)
    return findings, Pictures(trained=trained.model, shown=shown, attention=attention)


def _folders(words: Sequence[str], classes: Path | None) -> tuple[dict[str, Path], list[str]]:
    found: dict[str, Path] = {}
    for word in words:
        name, _, path = word.partition("=")
        if not name or not path:
            raise ValueError(f"--folder {word}: write NAME=PATH, as in imagenet-r=/data/imagenet-r")
        if not Path(path).is_dir():
            raise ValueError(f"--folder {word}: there is no folder {path}")
        if name in found:
            raise ValueError(f"--folder {word}: {name} is {found[name]} already; give each a name of its own")
        found[name] = Path(path)
    if not found:
        if classes is not None:
            raise ValueError(f"--classes={classes}: only --folder needs it; give that too, or leave this out")
        return {}, []
    if classes is None or not classes.is_file():
        raise ValueError(f"--classes={classes}: --folder needs a text file with the class folders of the training set")
    try:
        lines = classes.read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"--classes={classes}: no text file ({error})") from error
    return found, [line.strip() for line in lines if line.strip()]


def weights_id(model: nn.Module) -> str:
    """What tells weights apart: results are of those that they name."""
    return weights_hash(model)[:32]


def _about(run: Run, suite: str, model: nn.Module, seconds: float) -> dict[str, str | int | float | bool | None]:
    source = provenance([], run.device)
    versions, own = source["versions"], importlib.metadata.version("hjepa-benchmark")
    assert isinstance(versions, dict)
    seconds_trained = [spent for _, spent in training_seconds(read_rows(run.folder, run.steps))]
    return {
        "command": shlex.join(["hjepa-benchmark", *sys.argv[1:]]),
        "trained_by": "; ".join(one["command"] for one in settings.read_provenance(run.folder)),
        "suite": suite,
        "measured": str(source["started"]),
        "device": str(source["device"]),
        "git": str(source["git"]),
        "python": str(source["python"]),
        "versions": ", ".join(f"{name} {version}" for name, version in [("hjepa-benchmark", own), *versions.items()]),
        "recipe": run.config.recipe,
        "encoder": run.config.model,
        "steps": run.steps,
        "target_encoder": getattr(model, "target_encoder", None) is not None,
        "seed": run.config.run.seed,
        **measured_by(run.config),
        "test_samples": images_hash(run.test),
        "train_samples": images_hash(run.train),
        "weights": weights_id(model),
        "seconds": round(seconds, 1),
        "images_seen": run.steps * run.config.data.batch_size,
        "training_seconds": round(seconds_trained[-1], 1) if seconds_trained else None,
    }


def _tell(text: str) -> None:
    print(f"measuring: {text}", file=sys.stderr, flush=True)
