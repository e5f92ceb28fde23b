"""Errors of the logistic probes on changed images; mCE and relative mCE against the untrained encoder."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from hjepa_benchmark.runs import Run
from hjepa_benchmark.suite.findings import Details, Findings, known
from hjepa_benchmark.suite.plan import Plan
from hjepa_benchmark.suite.subjects import Subject
from hjepa_data import FolderSource
from hjepa_eval import FeatureName, LogisticProbe, bootstrap
from hjepa_eval.results.interval import bootstrap_means
from hjepa_eval.robustness.corrupt import corrupt
from hjepa_eval.robustness.error import Change, right_on_changed
from hjepa_eval.robustness.shift import lower_resolution, occlude, rotate
from hjepa_pretrain.evaluation import Images, load_images
from hjepa_pretrain.results import UNTRAINED, subject_of

Probes = Mapping[str, LogisticProbe]
CLEAN = "error/clean"
_BATCH = 256
SHIFTS: dict[str, tuple[tuple[float, ...], Callable[[Tensor, Tensor, float], Tensor]]] = {
    "rotation": ((15, 30, 45, 60, 90, 180), lambda images, samples, degrees: rotate(images, degrees)),
    "occlusion": ((0.1, 0.2, 0.3, 0.5, 0.7), lambda images, samples, share: occlude(images, share, samples=samples)),
    "resolution": ((0.75, 0.5, 0.375, 0.25, 0.125), lambda images, samples, share: lower_resolution(images, share)),
}


def measure_robustness(
    pairs: Sequence[tuple[Subject, Probes]],
    run: Run,
    plan: Plan,
    findings: Findings,
    tell: Callable[[str], None],
) -> None:
    """Classify changed images by the probes that were fitted on clean ones.

    Args:
        pairs: subjects with their probes by level; of the untrained model only the encoder is classified.
        run: its held-out images are changed.
        plan: which changes.
        findings: errors go there, and mean corruption errors.
        tell: says what is at work.
    """
    images = known(run.test).head(plan.corruption_images)
    names = {subject.name: subject.names(images, run.device) for subject, _ in pairs}
    wrong: dict[FeatureName, dict[str, Tensor]] = {}
    for metric, change in _changes(plan).items():
        tell(metric)
        pixels = images.pixels if change is None else _changed(change, images.pixels)
        for subject, probes in pairs:
            wanted = {"encoder"} if subject.name == UNTRAINED else set(probes)
            predict = partial(_predict, subject, probes, wanted, run.device)
            for level, right in right_on_changed(predict, pixels, images.labels).items():
                name = names[subject.name][level]
                findings.interval(metric, name, bootstrap(~right))
                wrong.setdefault(name, {})[metric] = ~right
    _mean_errors(wrong, plan, findings)


def check_folders(folders: Mapping[str, Path], classes: list[str], train: Images) -> None:
    """Refuse folders of other images, or names of classes, that do not fit, before anything is measured.

    Raises:
        ValueError: a class comes twice, there are fewer than the training images have, or a folder is no class.
    """
    learned = int(train.labels.max()) + 1
    if len(set(classes)) < len(classes) or len(classes) < learned:
        raise ValueError(
            f"--classes: {len(set(classes))} names in {len(classes)} lines, but labels of the training images go up to "
            f"{learned - 1}; allowed: a name for each, one a line, in the order of the labels"
        )
    for path in folders.values():
        FolderSource(path, classes=classes)


@torch.no_grad()
def measure_folders(
    folders: Mapping[str, Path], classes: list[str], subject: Subject, probes: Probes, run: Run, findings: Findings
) -> None:
    """Classify folders of other images of the training set's classes, among the classes that they have.

    Args:
        folders: folder by the name of its metric.
        classes: class folders of the training set, in the order of its labels.
        subject: what is measured.
        probes: its probes by level.
        run: says how images are cropped.
        findings: accuracies go there.
    """
    for title, path in folders.items():
        images = load_images(FolderSource(path, classes=classes), run.config.data.evaluation())
        present = torch.tensor(sorted(set(images.labels.tolist())))
        for level, features in subject.extract(images, run.device).items():
            among = copy.copy(probes[level])
            absent = torch.ones_like(among.bias, dtype=torch.bool)
            absent[present[present < len(absent)].to(absent.device)] = False
            among.bias = among.bias.masked_fill(absent, -torch.inf)
            right = among.predict(features.values.to(run.device)).cpu() == images.labels
            findings.accuracy(f"folder/{title}", features.name, right, details={"classes": len(present)})


def _changes(plan: Plan) -> dict[str, Change | None]:
    found: dict[str, Change | None] = {CLEAN: None}
    for name in plan.corruptions:
        for severity in plan.severities:
            found[f"error/{name}/{severity}"] = partial(_corrupt, name, severity)
    if plan.shifts:
        for shift, (strengths, change) in SHIFTS.items():
            for strength in strengths:
                found[f"error/{shift}/{strength:g}"] = partial(_shift, change, strength)
    return found


def _changed(change: Change, pixels: Tensor) -> Tensor:
    """All images changed, some at a time, once for all subjects."""
    return torch.cat([change(pixels[part], part) for part in torch.split(torch.arange(len(pixels)), _BATCH)])


def _corrupt(name: str, severity: int, images: Tensor, samples: Tensor) -> Tensor:
    return corrupt(images, name, severity, samples=samples)


def _shift(
    change: Callable[[Tensor, Tensor, float], Tensor], strength: float, images: Tensor, samples: Tensor
) -> Tensor:
    return change(images, samples, strength)


@torch.no_grad()
def _predict(
    subject: Subject, probes: Probes, wanted: set[str], device: torch.device, pixels: Tensor
) -> dict[str, Tensor]:
    features = subject.features(pixels.to(device))
    return {
        name.level: probes[name.level].predict(values.float())
        for name, values in features.items()
        if name.level in wanted
    }


def _mean_errors(wrong: Mapping[FeatureName, Mapping[str, Tensor]], plan: Plan, findings: Findings) -> None:
    """Added error, mCE and relative mCE of every level, the latter two over the untrained encoder's."""
    metrics = [[f"error/{name}/{severity}" for severity in plan.severities] for name in plan.corruptions]
    reference = next(name for name in wrong if subject_of(name.branch) == UNTRAINED and name.level == "encoder")
    base, base_added = _tables(wrong[reference], metrics)
    faultless, unhurt = _not_above_0(base, plan), _not_above_0(base_added, plan)
    details: Details = {
        "reference": "untrained encoder",
        "corruptions": len(metrics),
        "severities": len(plan.severities),
    }
    for name, found in wrong.items():
        own, added = _tables(found, metrics)
        findings.interval("added_error", name, bootstrap(added.mean(dim=(1, 2))))
        for metric, errors, over, nothing, why in (
            ("mce", own, base, faultless, "makes no errors under"),
            ("relative_mce", added, base_added, unhurt, "loses nothing by"),
        ):
            if nothing:
                undefined: Details = {**details, "undefined": f"the reference {why} {', '.join(nothing)}"}
                findings.value(metric, name, math.nan, len(own), undefined)
            else:
                findings.interval(metric, name, bootstrap(torch.stack((errors, over), dim=1), _ratio), details=details)


def _not_above_0(reference: Tensor, plan: Plan) -> list[str]:
    """Corruptions under which a draw of a reference's errors [n, c, s] adds up to 0 or less: no ratio is a number."""
    least = bootstrap_means(reference).sum(dim=2).amin(dim=0)
    return [name for name, one in zip(plan.corruptions, least.tolist(), strict=True) if one <= 0]


def _tables(found: Mapping[str, Tensor], metrics: list[list[str]]) -> tuple[Tensor, Tensor]:
    """Errors of each image by corruption and severity [n, c, s], and what they add to its error without change."""
    errors = torch.stack([torch.stack([found[metric] for metric in row], dim=1) for row in metrics], dim=1).double()
    return errors, errors - found[CLEAN].double()[:, None, None]


def _ratio(means: Tensor) -> Tensor:
    """Mean over corruptions of the error's sum over severities over the reference's; means [r, 2, c, s]."""
    sums = means.sum(dim=3)
    return (sums[:, 0] / sums[:, 1]).mean(dim=1)
