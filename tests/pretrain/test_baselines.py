"""Baselines train the same encoder on the same shards, and leave weights and results like any run."""

import json
import math
import runpy
from pathlib import Path

import pytest
import torch

from hjepa_data import Batch
from hjepa_eval import FeatureName, level_features, read_results
from hjepa_models import Encoder, GlobalConfig
from hjepa_models.objectives import nt_xent, vicreg_loss
from hjepa_pretrain import settings
from hjepa_pretrain.baselines import BaselineConfig, Inputs, build_baseline
from hjepa_pretrain.model import load_run
from hjepa_pretrain.results import subject_of
from hjepa_pretrain.task import build_task

KINDS = ("mae", "supervised")
ANYWHERE = torch.zeros(1, 1, 1, dtype=torch.long)


def inputs(images, labels, context=ANYWHERE, targets=ANYWHERE):
    return Inputs(views=[images], context_index=context, target_index=targets, labels=labels)


@pytest.mark.parametrize("recipe", [*KINDS, "lejepa", "simclr"])
def test_a_baseline_trains_resumes_and_is_measured(pretrain, tiny, tmp_path, capsys, recipe, read_losses):
    words = [word for word in tiny if not word.startswith("masks.")]
    run = tmp_path / "run"
    finished = pretrain.here(capsys, f"run.dir={run}", *words, f"recipe={recipe}", "preset=demo", "run.steps=3")
    assert finished.code == 0, finished.err
    assert len(read_losses(run)) == 3
    measured = read_results(run / "results.json").measurements
    assert {"trained", "untrained", "pixels"} == {subject_of(one.name.branch) for one in measured}
    page = (run / "report.html").read_text()
    assert ("<h2>Masks</h2>" in page) == ("predict the pixels of" in page) == (recipe == "mae")
    config, _ = settings.load([f"run.dir={run}"])
    model = load_run(run, config)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.isfinite(model.eval().features(images)).all()
    if recipe in KINDS:
        assert torch.equal(Encoder.from_pretrained(run).eval()(images).mean(1), model.features(images))


@pytest.mark.parametrize("kind", KINDS)
def test_the_only_level_is_read_as_those_of_an_hjepa(kind):
    hjepa = settings.load(["recipe=hjepa_global"])[0].hjepa
    model = build_baseline(BaselineConfig(kind=kind, num_classes=5), hjepa, seed=0).eval()
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = level_features(model, branches=("target", "online"))(images)
    names = [FeatureName(branch=branch, level="encoder", pooling="mean") for branch in ("target", "online")]
    assert list(found) == names
    assert all(torch.equal(found[name], model.features(images)) for name in names)


def test_every_method_starts_from_the_same_encoder():
    hjepa = settings.load(["recipe=hjepa_global"])[0].hjepa
    start = hjepa.build(seed=3).encoder.state_dict()
    for kind in KINDS:
        encoder = build_baseline(BaselineConfig(kind=kind, num_classes=5), hjepa, seed=3).encoder.state_dict()
        assert all(torch.equal(start[name], encoder[name]) for name in start)


@pytest.mark.parametrize(
    ("recipe", "idle"),
    [
        ("supervised", "hjepa.predictor.depth, hjepa.pyramid.levels, masks.context_ratio"),
        ("mae", "hjepa.pyramid.levels"),
        ("lejepa", None),
    ],
)
def test_what_a_baseline_does_not_read_is_named(caplog, recipe, idle):
    words = ("hjepa.encoder.depth=2", "hjepa.predictor.depth=2", "hjepa.pyramid.levels=1", "masks.context_ratio=0.3")
    settings.load((f"recipe={recipe}", *(word for word in words if recipe != "mae" or "masks" not in word)))
    said = [one.getMessage() for one in caplog.records if "does not read" in one.getMessage()]
    assert said == ([] if idle is None else [f"recipe={recipe} does not read {idle}"])


def test_losses_and_their_gradients_are_those_of_lightly():
    """At 1.6.0, which scripts/make_lightly.py has asked."""
    folder = Path(__file__).parent
    script = runpy.run_path(str(folder / "scripts" / "make_lightly.py"))
    level = GlobalConfig().build(16)
    ours = {
        "VICReg": lambda z: vicreg_loss(z[0], z[1], form="released"),
        "LeJEPA": lambda z: level.loss(z[:2], 0),
        "LeJEPA, two small views": lambda z: level.loss(z, 0, 2),
        **{f"NT-Xent {t}": lambda z, t=t: nt_xent(z[:2], t) for t in script["TEMPERATURES"]},
    }
    theirs = json.loads((folder / "lightly.json").read_text())
    assert ours.keys() == theirs.keys()
    for name, loss in ours.items():
        for rows in script["ROWS"]:
            found, expected = script["describe"](loss, rows), theirs[name][str(rows)]
            assert found[0] == pytest.approx(expected[0], rel=1e-6), name
            assert math.dist(found[1:], expected[1:]) < 1e-6 * math.hypot(*expected[1:]), name


def test_mae_predicts_the_normalised_pixels_of_hidden_patches_only():
    hjepa = settings.load(["recipe=mae"])[0].hjepa
    model = build_baseline(BaselineConfig(kind="mae"), hjepa, seed=0)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    context, targets = torch.tensor([[0, 1, 5]] * 2), torch.tensor([[[2, 10]]] * 2)
    model.requires_grad_(False)
    loss = model(inputs(images, torch.zeros(2), context, targets)).loss
    guess = model.pixels(model.decoder(model.encoder(images, context), context, targets).flatten(1, 2))
    total = 0.0
    for row in range(2):
        for number, place in enumerate((2, 10)):
            top, left = place // 4 * 8, place % 4 * 8
            patch = images[row, :, top : top + 8, left : left + 8].double()
            wanted = model.encoder.patchify(images)[row, place].double()
            assert torch.equal(wanted.sort().values, patch.flatten().sort().values)
            wanted = (wanted - wanted.mean()) / (wanted.var(unbiased=True) + 1e-6).sqrt()
            total += float((guess[row, number].double() - wanted).square().mean())
    assert float(loss) == pytest.approx(total / 4, rel=1e-5)


def test_mae_hides_patches_of_the_first_view_alone():
    words = ("recipe=mae", "data.views=2", "hjepa.masked_views=2")
    config, _ = settings.load(words)
    task = build_task(config)
    view = torch.zeros(3, 3, 32, 32, dtype=torch.uint8)
    batch = Batch(views=(view, view), labels=torch.zeros(3).long(), sample=torch.arange(3), epoch=torch.zeros(3).long())
    assert torch.isfinite(task(batch, 0).loss)


def test_images_without_a_label_do_not_count():
    hjepa = settings.load(["recipe=supervised"])[0].hjepa
    model = build_baseline(BaselineConfig(kind="supervised", num_classes=3), hjepa, seed=0).eval().requires_grad_(False)
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    some = model(inputs(images, torch.tensor([2, -1, 0]))).loss
    known = model(inputs(images[[0, 2]], torch.tensor([2, 0]))).loss
    assert float(some) == pytest.approx(float(known), rel=1e-5)
    assert float(model(inputs(images, torch.full((3,), -1))).loss) == 0.0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["recipe=simclr", "data.views=1"], ["data.views=1", "2"]),
        (["recipe=simclr", "hjepa.global_level.temperature=0"], ["temperature=0", "allowed"]),
        (["recipe=supervised", "baseline.kind=byol"], ["byol", "mae"]),
        (["recipe=supervised", "baseline.num_classes=2"], ["num_classes=2", "10 and more"]),
    ],
)
def test_wrong_words(pretrain, tiny, tmp_path, capsys, words, expected):
    finished = pretrain.here(capsys, f"run.dir={tmp_path}/run", *tiny, *words)
    assert finished.code == 2
    assert all(word in finished.message for word in expected), finished.message
