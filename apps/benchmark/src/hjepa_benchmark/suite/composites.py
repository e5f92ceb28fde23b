"""What each level keeps of composites of which all is known: factors, masks, and how many dimensions hold the class."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from hjepa_benchmark.runs import Run
from hjepa_benchmark.suite.findings import Details, Findings
from hjepa_benchmark.suite.subjects import Subject, level_grids, tokens_of
from hjepa_eval import (
    FactorScore,
    FeatureName,
    SegmentationProbe,
    bootstrap,
    bottleneck_sweep,
    dci,
    factor_probe,
    mean_iou,
)
from hjepa_pretrain.demo import DemoSet, compose_demo
from hjepa_pretrain.evaluation import Images
from hjepa_pretrain.results import PIXELS

DATA = "composites"
_SEED = 7
_DENSE_TRAIN, _DENSE_TEST = 1_000, 500


@dataclass(kw_only=True, slots=True)
class Composites:
    """Pictures with what is known of them.

    Attributes:
        images: pixels and classes.
        factors: integers [n] (class) or floats [n, c] (place, scale, rotation, tint).
        background: number of the photograph among those of the split.
        masks: 1 where the garment is, 0 elsewhere [n, H, W].
    """

    images: Images
    factors: dict[str, Tensor]
    background: Tensor
    masks: Tensor


def compose(split: str, count: int, size: tuple[int, int]) -> Composites:
    """Compose fresh pictures, stretched where they are no squares; garments and backgrounds are those of the split."""
    demo = compose_demo(split, count, _SEED, max(size))
    pixels, masks = torch.from_numpy(demo.images).permute(0, 3, 1, 2), torch.from_numpy(demo.masks)
    if size != pixels.shape[2:]:
        pixels = F.interpolate(pixels.float(), size, mode="area").round().to(torch.uint8)
        masks = F.interpolate(masks[:, None].float(), size, mode="nearest-exact")[:, 0]
    return Composites(
        images=Images(pixels=pixels.contiguous(), labels=torch.from_numpy(demo.labels)),
        factors=_factors(demo),
        background=torch.from_numpy(demo.background),
        masks=masks.long(),
    )


def measure_composites(
    subjects: list[Subject],
    run: Run,
    findings: Findings,
    tell: Callable[[str], None],
    counts: tuple[int, int],
) -> None:
    """Probe factors, disentanglement and bottlenecks of every level, and segment by its tokens.

    Args:
        subjects: what is measured.
        run: says the size of pictures.
        findings: numbers go there; their details say that they are of composites.
        tell: says what is at work.
        counts: pictures that are learned from, and pictures that are tested: other garments on other backgrounds.
    """
    height, width = run.config.data.image_size
    train, test = (compose(split, n, (height, width)) for split, n in zip(("train", "eval"), counts, strict=True))
    for subject in subjects:
        tell(f"factors, {subject.name}")
        x, test_x = (subject.extract(part.images, run.device) for part in (train, test))
        for level, features in x.items():
            _factor_scores(features.values, test_x[level].values, train, test, features.name, findings)
            if subject.name != PIXELS:
                _structure(features.values, test_x[level].values, train, test, features.name, findings)
        if subject.model is not None:
            tell(f"segmentation, {subject.name}")
            _segment(subject, run, train, test, findings)


def _factors(demo: DemoSet) -> dict[str, Tensor]:
    return {
        "class": torch.from_numpy(demo.labels),
        "place": torch.from_numpy(demo.center),
        "scale": torch.from_numpy(demo.scale),
        "rotation": torch.from_numpy(demo.rotation),
        "tint": torch.from_numpy(demo.tint),
    }


def _factor_scores(
    x: Tensor, test_x: Tensor, train: Composites, test: Composites, name: FeatureName, findings: Findings
) -> None:
    for score in factor_probe(x, train.factors, test_x, test.factors):
        _keep(score, len(x), name, findings)
    # Backgrounds of the test set are other photographs: which of the training set's it is, is told on halves of that.
    half, photo = len(x) // 2, train.background
    for score in factor_probe(x[:half], {"background": photo[:half]}, x[half:], {"background": photo[half:]}):
        _keep(score, half, name, findings)


def _keep(score: FactorScore, n_train: int, name: FeatureName, findings: Findings) -> None:
    details: Details = {"data": DATA, "kind": score.kind, "chance": score.chance}
    findings.interval(f"factor/{score.factor}", name, score.interval, n_train=n_train, details=details)


def _structure(
    x: Tensor, test_x: Tensor, train: Composites, test: Composites, name: FeatureName, findings: Findings
) -> None:
    factors, test_factors = (_columns(part.factors) for part in (train, test))
    found = dci(x, factors, test_x, test_factors)
    for metric, named in (
        ("disentanglement", "dci_disentanglement"),
        ("mean_completeness", "dci_mean_completeness"),
        ("mean_informativeness", "dci_error"),
    ):
        findings.interval(named, name, found.intervals[metric], n_train=found.n_train, details={"data": DATA})
    for score in bottleneck_sweep(x, train.factors["class"], test_x, test.factors["class"]):
        details: Details = {"data": DATA, "variance": score.variance}
        findings.interval(f"width/{score.width}", name, score.interval, n_train=len(x), details=details)


def _columns(factors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Factors with one column each."""
    place = factors["place"]
    others = {name: factors[name] for name in ("class", "scale", "rotation")}
    return {**others, "y": place[:, 0], "x": place[:, 1]}


def _segment(subject: Subject, run: Run, train: Composites, test: Composites, findings: Findings) -> None:
    assert subject.model is not None
    grids = level_grids(run, subject.model)
    parts = [(train, min(_DENSE_TRAIN, len(train.masks))), (test, min(_DENSE_TEST, len(test.masks)))]
    pictures = [Images(pixels=part.images.pixels[:n], labels=part.images.labels[:n]) for part, n in parts]
    tokens, test_tokens = (tokens_of(run, subject.model, one, list(grids)) for one in pictures)
    masks, test_masks = (part.masks[:n] for part, n in parts)
    for level, grid in grids.items():
        if grid == (1, 1):
            continue
        probe = SegmentationProbe().fit(tokens[level], masks, grid, device=run.device)
        confusion = probe.confusion(test_tokens[level], test_masks)
        name = FeatureName(branch=subject.branch, level=level, pooling="none")
        findings.interval("miou", name, bootstrap(confusion, mean_iou), n_train=len(masks), details={"data": DATA})
