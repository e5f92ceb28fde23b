"""What the report and the results say is what was measured."""

import json

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.font_manager import fontManager

from hjepa_eval import knn_accuracy, rankme
from hjepa_pretrain import evaluation, settings
from hjepa_pretrain.dry_run import step_cost_of
from hjepa_pretrain.evaluation import Images, level_features, load_pair, open_sources
from hjepa_pretrain.model import build_model
from hjepa_pretrain.report import figures
from hjepa_pretrain.report.page import page
from hjepa_pretrain.report.write import loss_section, rank_section


@pytest.mark.parametrize(("recipe", "branch"), [("ijepa", "target"), ("hjepa", "target"), ("hjepa_contrast", "online")])
def test_features_are_of_the_target_branch_where_there_is_one(recipe, branch):
    config, _ = settings.load([f"recipe={recipe}"])
    images = Images(pixels=torch.zeros(2, 3, 32, 32, dtype=torch.uint8), labels=torch.zeros(2).long())
    found = level_features(build_model(config), images, config, torch.device("cpu"))
    assert {features.name.branch for features in found.values()} == {branch}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_rows_on_the_way_are_of_every_level_and_ranks_of_the_whole_set(
    pretrain, tiny, tmp_path, capsys, monkeypatch, read_rows, precision
):
    monkeypatch.setattr(evaluation, "RANK_SAMPLES", 8)
    words = (*tiny, "run.steps=2", "eval.every_steps=9", "eval.online_samples=40", "eval.at_end=false")
    words += (f"eval.precision={precision}",)
    assert pretrain.here(capsys, f"run.dir={tmp_path}/run", *words).code == 0
    config, _ = settings.load([f"run.dir={tmp_path}/run"])
    model, row = build_model(config), read_rows(tmp_path / "run")[0]
    train, test = (
        level_features(model, images, config, torch.device("cpu"))
        for images in load_pair(config, open_sources(config), 40, 40)
    )
    assert {name for name in row if name.startswith("eval/")} == {
        f"eval/{level}/{measure}" for level in train for measure in ("knn_20", "rankme")
    }
    for level, bank in train.items():
        found = knn_accuracy(bank.values, bank.labels, test[level].values, test[level].labels, ks=(20,))
        assert row[f"eval/{level}/knn_20"] == pytest.approx(found[20]), level
        assert row[f"eval/{level}/rankme"] == pytest.approx(float(rankme(bank.some(8).values)), rel=1e-4), level


def test_features_are_of_the_precision_that_is_asked_for():
    pixels = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = Images(pixels=pixels, labels=torch.zeros(4).long())
    single, half = (
        level_features(build_model(config), images, config, torch.device("cpu"))
        for config in (settings.load([f"eval.precision={one}"])[0] for one in ("fp32", "bf16"))
    )
    for level, wanted in single.items():
        found = half[level]
        assert found.values.dtype == torch.float32, level
        error = (found.values - wanted.values).norm() / wanted.values.norm()
        assert 1e-4 < error < 3e-2, (level, error)


def test_no_reading_is_no_all_clear():
    quiet, loud = {"step": 1, "monitor/alarm": 0.0}, {"step": 2, "monitor/alarm": 1.0}
    assert 'class="alarm">Nobody looked' in rank_section([{"step": 1, "train/loss": 1.0}]).body
    assert 'class="fine">No collapse' in rank_section([quiet]).body
    assert 'class="alarm">Collapse alarm at 1 steps: 2.' in rank_section([quiet, loud]).body


def test_only_levels_are_called_levels():
    row = {"step": 1, "train/loss": 3.0, "train/loss_level_0": 1.0, "train/loss_level_1": 1.0}
    drawn = len(loss_section([row]).pictures)
    assert (
        len(loss_section([row | {"train/loss_level_sigreg": 1.0, "train/loss_level_global": 1.0}]).pictures)
        == drawn + 2
    )
    assert len(loss_section([{"step": 1, "train/loss": 3.0, "train/loss_level_contrast": 3.0}]).pictures) == 1


def test_lines_of_many_levels_are_told_apart(monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "svg", drawn.append)
    levels = ("encoder", "0", "1", "map0", "pooled", "all", "global")
    rows = [{"step": step, **{f"eval/{level}/knn_20": 0.1 for level in levels}} for step in range(3)]
    for smooth in (1, 2):
        figures.curves(rows, list(rows[0])[1:], "", smooth=smooth)
        lines = [line for line in drawn[-1].axes[0].get_lines() if not line.get_label().startswith("_")]
        assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == len(levels)
        plt.close(drawn[-1])


def test_names_of_classes_are_no_mathematics():
    image = np.zeros((1, 4, 4, 3), np.uint8)
    names = ["from_$5_to_$10"]
    assert figures.neighbours(image, image[None], names, [names]).startswith(b"\x89PNG")


@pytest.fixture
def no_fallback(monkeypatch):
    with plt.rc_context({"font.family": ["sans-serif"]}):
        monkeypatch.setattr(fontManager, "ttflist", [font for font in fontManager.ttflist if "DejaVu" in font.name])
        yield


def draw_neighbours(name):
    image = np.zeros((1, 4, 4, 3), np.uint8)
    return figures.neighbours(image, image[None], [name], [[name]])


@pytest.mark.usefixtures("no_fallback")
def test_letters_that_no_font_has_are_one_line(caplog):
    assert draw_neighbours("猫 dog 犬").startswith(b"\x89PNG")
    (line,) = caplog.messages
    assert line.startswith("no font has 猫犬, drawn as boxes")


@pytest.mark.usefixtures("no_fallback")
def test_letters_come_from_a_font_that_is_installed(tmp_path, caplog):
    before = draw_neighbours("猫")
    caplog.clear()
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    pen.lineTo((500, 900))
    pen.lineTo((1000, 0))
    pen.closePath()
    font = FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder([".notdef", "cat"])
    font.setupCharacterMap({ord("猫"): "cat"})
    font.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "cat": pen.glyph()})
    font.setupHorizontalMetrics({".notdef": (1000, 0), "cat": (1000, 0)})
    font.setupHorizontalHeader(ascent=900, descent=-100)
    font.setupNameTable({"familyName": "Noto Sans CJK JP", "styleName": "Regular"})
    font.setupOS2(sTypoAscender=900, sTypoDescender=-100)
    font.setupPost()
    font.save(tmp_path / "cjk.ttf")
    fontManager.addfont(tmp_path / "cjk.ttf")
    figures.use_fonts()
    assert draw_neighbours("猫") != before
    assert caplog.messages == []


def test_the_page_counts_the_steps_that_were_done(pretrain, tiny, tmp_path, capsys):
    stop = "early_stop={metric: train/loss, mode: min, min_delta: 1000, patience: 1}"
    words = (*tiny, "run.steps=5", "data.eval=null", stop)
    assert pretrain.here(capsys, f"run.dir={tmp_path}/run", *words).code == 0
    step = json.loads((tmp_path / "run" / "results.json").read_text())["about"]["steps"]
    assert step < 5
    assert f", {step} steps of 16 images" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.slow
def test_results_of_earlier_weights_do_not_outlive_them(pretrain, tiny, tmp_path, capsys, monkeypatch):
    run = f"run.dir={tmp_path}/run"
    assert pretrain.here(capsys, run, *tiny, "run.steps=1", "eval.at_end=false").code == 0

    def fail(*_):
        raise OSError("the shards are gone")

    monkeypatch.setattr("hjepa_pretrain.run.load_pair", fail)
    assert pretrain.here(capsys, run, "run.steps=2").code == 1
    assert not (tmp_path / "run" / "results.json").exists()
    monkeypatch.undo()
    assert pretrain.here(capsys, run).code == 0
    assert json.loads((tmp_path / "run" / "results.json").read_text())["about"]["steps"] == 2


def test_a_dry_run_counts_local_views(tiny):
    words = ("recipe=lejepa", "data.views=2", "data.local_size=[16,16]", "plan.dry=true", "model=vit_nano_patch8")
    few, many = (step_cost_of(settings.load([*tiny, *words, f"data.local_views={count}"])[0]).flops for count in (0, 4))
    assert many > 1.4 * few


def test_a_page_may_name_a_file_whose_name_is_no_text():
    assert rb"<h1>r\udcfcn</h1>" in page("r\udcfcn", "", []).encode()
