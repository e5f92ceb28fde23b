"""Crops of an image, and the patches that two of them share."""

import pytest
import torch

from hjepa_benchmark.runs import open_run
from hjepa_benchmark.suite import probes
from hjepa_benchmark.suite.findings import Findings, find
from hjepa_benchmark.suite.probes import match_views, random_boxes, random_crop
from hjepa_benchmark.suite.subjects import level_grids, subjects
from hjepa_pretrain.evaluation import Images


def test_crops_are_parts_of_the_image():
    ramp = torch.arange(32, dtype=torch.uint8).expand(5, 3, 32, 32)
    crops = random_crop(ramp, 0)
    assert crops.shape == ramp.shape
    assert torch.equal(crops, random_crop(ramp, 0))
    assert not torch.equal(crops, random_crop(ramp, 1))
    steps = crops[:, 0, 0].double().diff(dim=1)
    mirrored = steps.sum(dim=1) < 0
    assert 0 < int(mirrored.sum()) < 5 or len(mirrored) < 5
    assert bool((steps.sum(dim=1).abs() <= 32).all())
    assert torch.equal(random_crop(ramp[:2], 0), crops[:2])


def test_boxes_say_where_crops_come_from():
    """Of images that hold their own coordinates."""
    y, x = torch.meshgrid(torch.arange(32), torch.arange(48), indexing="ij")
    places = torch.stack((y, x, torch.zeros_like(x))).to(torch.uint8).expand(40, -1, -1, -1)
    crops, (boxes, mirrored) = random_crop(places, 1).double(), random_boxes(places.shape, 1)
    assert 0 < int(mirrored.sum()) < 40
    assert bool((boxes[:, 2] * boxes[:, 3] >= 0.399 * 32 * 48).all())
    for crop, (top, left, height, width), flipped in zip(crops, boxes.double(), mirrored, strict=True):
        rows = (top + height * (torch.arange(32) + 0.5) / 32 - 0.5).clamp(0, 31)
        columns = (left + width * (torch.arange(48) + 0.5) / 48 - 0.5).clamp(0, 47)
        assert (crop[0] - rows[:, None]).abs().max() < 0.51
        assert (crop[1] - (columns.flip(0) if flipped else columns)).abs().max() < 0.51


def test_corresponding_patches_are_found_by_what_tells_places(run):
    """Tokens of pictures whose colours are their coordinates, beside those of pictures without any."""
    opened, found = open_run(run), {}
    subject = subjects(opened)[0]
    y, x = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    told = 7 * torch.stack((y, x, 31 - x)).to(torch.uint8)
    with pytest.MonkeyPatch.context() as patch:
        # The mean of each patch stands for its token.
        patch.setattr(probes, "tokens_of", lambda _run, _model, images, levels: {
            level: torch.nn.functional.adaptive_avg_pool2d(
                images.pixels.float() - 110, level_grids(opened, subject.model)[level]
            ).flatten(2).transpose(1, 2) for level in levels
        })  # fmt: skip
        for name, picture in (("told", told), ("plain", torch.full_like(told, 7))):
            opened.test = Images(pixels=picture.expand(60, -1, -1, -1), labels=torch.zeros(60).long())
            findings = Findings()
            match_views(subject, opened, findings)
            found[name] = find(findings.measurements, "correspondence", subject="trained", level="encoder")
    # The cosine of two colours is not quite their distance; what ignores that crops are mirrored finds a third.
    assert found["told"].value > 0.5
    assert found["plain"].value < 0.15
    assert found["told"].low < found["told"].value < found["told"].high
    assert found["told"].n == 60
    assert found["told"].details["chance"] == 1 / 16
