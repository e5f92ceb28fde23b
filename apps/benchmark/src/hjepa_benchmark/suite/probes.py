"""Probes and label-free measures of features, by level."""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hjepa_benchmark.runs import Run
from hjepa_benchmark.suite.findings import Details, Findings, check_pair, known
from hjepa_benchmark.suite.plan import Plan
from hjepa_benchmark.suite.subjects import Subject, level_grids, normalized, tokens_of
from hjepa_data.random import spread
from hjepa_eval import (
    AttentiveProbe,
    AttentiveProbeConfig,
    FeatureName,
    FeatureSet,
    LogisticProbe,
    alignment,
    average_precision,
    bootstrap,
    cka_interval,
    correspondence_accuracy,
    crop_matches,
    few_shot,
    jackknife,
    knn_by_metric,
    lidar,
    measure_unlabelled,
)
from hjepa_eval.probes.whitening import FLOOR
from hjepa_eval.robustness.draws import Draws
from hjepa_eval.robustness.maps import read_between
from hjepa_pretrain.evaluation import Images

Features = dict[str, FeatureSet]
_RANK_SAMPLES = 2_000
_LEAST = 20  # two for each group of the jackknife
_RETRIEVAL = 2_000
_ATTENTIVE = 2_000
_VIEW_IMAGES, _VIEWS = 400, 10


def probe_levels(
    subject: Subject, train: Features, test: Features, run: Run, plan: Plan, findings: Findings
) -> dict[str, LogisticProbe]:
    """kNN, logistic and few-shot accuracy of every level, and mean average precision.

    Returns:
        The logistic probes by level, which classify changed images too.
    """
    probes = {}
    for level, bank in train.items():
        x, held_out = bank.labelled(), test[level].labelled()
        check_pair(x, held_out)
        values, labels, probe_x = (part.to(run.device) for part in (x.values, x.labels, held_out.values))
        truth = held_out.labels.to(run.device)
        wanted = sorted({run.config.eval.k, *plan.ks})
        ks = [k for k in wanted if k <= len(x)]
        floor = None if subject.model is None else FLOOR
        for metric, predicted in knn_by_metric(values, labels, probe_x, ks=ks, floor=floor).items():
            findings.accuracy(metric, bank.name, predicted == truth, n_train=len(x))
        probes[level] = LogisticProbe().fit(values, labels)
        predicted = probes[level].predict(probe_x)
        findings.predicted[subject.name, level] = predicted.cpu()
        findings.accuracy("linear", bank.name, predicted == truth, n_train=len(x), details={"l2": probes[level].l2})
        scores = {one.labels: one for one in few_shot(values, labels, probe_x, truth, plan.few_shot)}
        for few, score in scores.items():
            about: Details = {"draws": len(score.draws)}
            metric = f"few_shot_{few}"
            findings.interval(metric, bank.name, score.interval, n=len(truth), n_train=score.n_train, details=about)
        shots = (f"{shot}-shot" for shot in plan.few_shot.shots)
        left_out = [*(f"kNN k={k}" for k in wanted if k not in ks), *(few for few in shots if few not in scores)]
        if left_out:
            smallest = int(torch.unique(labels, return_counts=True)[1].min())
            there = f"{len(x)} labelled training images, {smallest} of the smallest class"
            findings.left_out = f"{', '.join(left_out)}: {there}, are too few"
        if plan.retrieval:
            asked = torch.from_numpy(spread(len(truth), _RETRIEVAL)).to(run.device)
            precision = average_precision(probe_x[asked], truth[asked], values, labels)
            precision = precision[precision.isfinite()]  # of a class without training images there is none
            if len(precision):
                findings.interval("map", bank.name, bootstrap(precision), n_train=len(x))
    return probes


def rank_levels(train: Features, findings: Findings) -> None:
    """What needs no label, of every level."""
    for features in train.values():
        if len(features) >= _LEAST:
            findings.measurements += measure_unlabelled(features, samples=_RANK_SAMPLES)


def probe_tokens(subject: Subject, run: Run, configs: Sequence[AttentiveProbeConfig], findings: Findings) -> None:
    """Attentive probes on the tokens of the encoder."""
    assert subject.model is not None
    train, test = known(run.train).head(_ATTENTIVE), known(run.test)
    x, test_x = (tokens_of(run, subject.model, images, ["encoder"])["encoder"] for images in (train, test))
    name = FeatureName(branch=subject.branch, level="encoder", pooling="attentive")
    for config in configs:
        probe = AttentiveProbe(config).fit(x, train.labels, device=run.device)
        right = probe.predict(test_x) == test.labels
        findings.accuracy(f"attentive_{config.blocks}", name, right, n_train=len(x))


def compare_levels(train: Features, findings: Findings) -> None:
    """CKA between every pair of levels."""
    if len(next(iter(train.values()))) < _LEAST:
        return
    for second, first in itertools.combinations(train, 2):
        interval = cka_interval(train[first].values, train[second].values)
        pooling = "+".join(dict.fromkeys(train[level].name.pooling for level in (first, second)))
        name = FeatureName(branch=train[first].name.branch, level=f"{first} - {second}", pooling=pooling)
        findings.interval("cka", name, interval)


@torch.no_grad()
def compare_views(subject: Subject, run: Run, findings: Findings) -> None:
    """LiDAR and alignment, on random crops of the same images."""
    pixels = run.test.head(_VIEW_IMAGES).pixels
    if len(pixels) < _LEAST:
        return
    crops = [subject.features(random_crop(pixels, number).to(run.device)) for number in range(_VIEWS)]
    for name in crops[0]:
        z = torch.stack([one[name].float().cpu() for one in crops], dim=1)
        found = jackknife(z, lidar, within=(1.0, math.inf))
        findings.interval("lidar", name, found, details={"views": _VIEWS})
        found = jackknife(z[:, :2], lambda part: alignment(part[:, 0], part[:, 1]), within=(0.0, 4.0))
        findings.interval("alignment", name, found)


def match_views(subject: Subject, run: Run, findings: Findings) -> None:
    """How often the nearest patch of another crop of the image shows the same place, of every level on a grid."""
    assert subject.model is not None
    images, grids = run.test.head(_VIEW_IMAGES), level_grids(run, subject.model)
    (box, mirrored), (other, other_mirrored) = (random_boxes(images.pixels.shape, number) for number in range(2))
    crops = [Images(pixels=random_crop(images.pixels, number), labels=images.labels) for number in range(2)]
    first, second = (tokens_of(run, subject.model, one, list(grids)) for one in crops)
    for level, grid in grids.items():
        if grid == (1, 1):
            continue
        matches = crop_matches(box, other, grid, first_flipped=mirrored, second_flipped=other_mirrored)
        right = correspondence_accuracy(first[level], second[level], matches, grid)
        name = FeatureName(branch=subject.branch, level=level, pooling="none")
        chance: Details = {"chance": 1 / (grid[0] * grid[1])}
        findings.interval("correspondence", name, bootstrap(right[right.isfinite()]), details=chance)


def random_boxes(shape: Sequence[int], number: int) -> tuple[Tensor, Tensor]:
    """Boxes of 40 to 100 % of the area of each image, and which of them are mirrored.

    Args:
        shape: of the images [n, 3, H, W].
        number: of the draw.

    Returns:
        Top, left, height and width of each box, pixels; and booleans.
    """
    batch, _, height, width = shape
    draws = Draws(0, torch.arange(batch), "crop", number, device="cpu")
    side = draws.uniform(0.4, 1.0).sqrt()
    top, left = (draws.uniform(0, 1) * (1 - side) for _ in range(2))
    boxes = torch.stack((top * height, left * width, side * height, side * width), dim=1)
    return boxes, draws.uniform(0, 1) < 0.5


def random_crop(pixels: Tensor, number: int) -> Tensor:
    """Crops of the boxes of this draw at the old size."""
    batch, _, height, width = pixels.shape
    boxes, mirrored = random_boxes(pixels.shape, number)
    top, left, down, right = (part[:, None, None] for part in boxes.unbind(1))
    y, x = ((torch.arange(n) + 0.5) / n for n in (height, width))
    y_at = top + down * y[:, None] - 0.5
    x_at = left + right * x[None] - 0.5
    x_at = torch.where(mirrored[:, None, None], x_at.flip(2), x_at)
    shape = (batch, height, width)
    crop = read_between(pixels.float(), y_at.expand(shape), x_at.expand(shape), border="nearest")
    return crop.round().to(torch.uint8)


def attention_of(subject: Subject, run: Run, pixels: Tensor) -> Tensor:
    """Mean attention that each patch receives in the last block of the encoder, by head [n, heads, rows, columns]."""
    assert subject.model is not None
    model = subject.model
    encoder = getattr(model, "target_encoder", None) or model.encoder
    maps: Tensor = encoder.attention_maps(normalized(run, pixels.to(run.device)))[-1].float().cpu()
    rows, columns = run.config.hjepa.encoder.grid[-2:]
    received = maps.mean(2)[..., -rows * columns :]
    return received.reshape(*received.shape[:2], rows, columns)
