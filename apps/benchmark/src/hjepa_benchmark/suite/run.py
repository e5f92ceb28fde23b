"""The suite: measure a run, keep the results, write the page."""

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from hjepa_benchmark.runs import Run, open_run, training_cost
from hjepa_benchmark.suite.composites import measure_composites
from hjepa_benchmark.suite.findings import Findings, images_hash, known, save_right
from hjepa_benchmark.suite.plan import PLANS, Plan
from hjepa_benchmark.suite.probes import attention_of, compare_levels, compare_views, probe_levels, probe_tokens
from hjepa_benchmark.suite.report import Pictures, write_page
from hjepa_benchmark.suite.robustness import measure_folders, measure_robustness
from hjepa_benchmark.suite.subjects import PIXELS, TRAINED, Subject, subjects
from hjepa_benchmark.suite.summary import summary_table
from hjepa_eval import FeatureSet, LogisticProbe, Results, weights_hash, write_results
from hjepa_pretrain.provenance import provenance

FOLDER, RESULTS_FILE, PAGE_FILE = "benchmark", "results.json", "report.html"
_ATTENTION_IMAGES = 8


def run_suite(
    folder: Path,
    *,
    suite: str = "quick",
    train: str | None = None,
    held_out: str | None = None,
    corruption_images: int | None = None,
    folders: Sequence[str] = (),
    classes: Path | None = None,
    console: Console | None = None,
) -> Results:
    """Measure a run; write `benchmark/results.json`, `right.safetensors` and `report.html` into its folder.

    Args:
        folder: of a finished run.
        suite: quick or full.
        train: shards that are learned from; None takes those of the run.
        held_out: shards that are classified; None takes those of the run.
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
    run = open_run(folder, train=train, held_out=held_out)
    began = time.monotonic()
    torch.set_num_threads(run.config.run.threads or torch.get_num_threads())
    findings, pictures = measure(run, plan, others, names)
    about = _about(run, suite, pictures.trained, time.monotonic() - began)
    results = Results(model=run.name, data=run.data, measurements=findings.measurements, about=about)
    target = folder / FOLDER
    target.mkdir(exist_ok=True)
    save_right(findings.right, target)
    write_results(results, target / RESULTS_FILE)
    write_page(target / PAGE_FILE, run, results, findings, pictures)
    console = console or Console(soft_wrap=True)
    console.print(summary_table(results))
    console.print(f"results: {target / RESULTS_FILE}\nreport: {target / PAGE_FILE}", highlight=False)
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
    if not len(known(run.train).labels) or not len(known(run.test).labels):
        raise ValueError(f"{run.folder}: no labelled image to measure on; give shards with labels: --train, --eval")
    findings, pairs = Findings(), []
    everyone = subjects(run)
    for subject in everyone:
        _tell(f"features and probes, {subject.name}")
        train, test = (subject.extract(images, run.device) for images in (run.train, run.test))
        pairs.append((subject, probe_levels(subject, train, test, run, plan, findings)))
        if subject.name != PIXELS:
            _beyond(subject, train, run, plan, findings)
    measure_robustness(pairs, run, plan, findings, _tell)
    if folders:
        measure_folders(folders, classes, *_trained(pairs), run, findings)
    if plan.composites is not None:
        measure_composites(everyone, run, findings, _tell, plan.composites)
    shown = run.test.head(_ATTENTION_IMAGES)
    trained = everyone[0]
    assert trained.model is not None
    attention = attention_of(trained, run, shown.pixels)
    return findings, Pictures(trained=trained.model, shown=shown, attention=attention)


def _trained(pairs: list[tuple[Subject, dict[str, LogisticProbe]]]) -> tuple[Subject, dict[str, LogisticProbe]]:
    return next(pair for pair in pairs if pair[0].name == TRAINED)


def _beyond(subject: Subject, train: dict[str, FeatureSet], run: Run, plan: Plan, findings: Findings) -> None:
    if plan.attentive:
        _tell(f"attentive probes, {subject.name}")
        probe_tokens(subject, run, plan.attentive, findings)
    if len(train) > 1:
        compare_levels(train, findings)
    if plan.views:
        compare_views(subject, run, findings)


def _folders(words: Sequence[str], classes: Path | None) -> tuple[dict[str, Path], list[str]]:
    found = {}
    for word in words:
        name, _, path = word.partition("=")
        if not name or not path:
            raise ValueError(f"--folder {word}: write NAME=PATH, as in imagenet-r=/data/imagenet-r")
        if not Path(path).is_dir():
            raise ValueError(f"--folder {word}: there is no folder {path}")
        found[name] = Path(path)
    if not found:
        return {}, []
    if classes is None or not classes.is_file():
        raise ValueError(f"--classes={classes}: --folder needs a text file with the class folders of the training set")
    return found, [line.strip() for line in classes.read_text().splitlines() if line.strip()]


def _about(run: Run, suite: str, model: nn.Module, seconds: float) -> dict[str, str | int | float | bool | None]:
    source = provenance([])
    versions = source["versions"]
    assert isinstance(versions, dict)
    about: dict[str, str | int | float | bool | None] = {
        "command": " ".join(["hjepa-benchmark", *sys.argv[1:]]),
        "suite": suite,
        "measured": str(source["started"]),
        "device": str(source["device"]),
        "git": str(source["git"]),
        "python": str(source["python"]),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "recipe": run.config.recipe,
        "encoder": run.config.model,
        "steps": run.config.run.steps,
        "seed": run.config.run.seed,
        "k": run.config.eval.k,
        "test_samples": images_hash(run.test),
        "train_samples": images_hash(run.train),
        "weights": weights_hash(model)[:32],
        "seconds": round(seconds, 1),
    }
    return {**about, **training_cost(run.folder, run.config.data.batch_size)}


def _tell(text: str) -> None:
    print(f"measuring: {text}", file=sys.stderr, flush=True)
