"""Every mask law of hjepa-data can be chosen by name, trains, and is the law of the run when it goes on."""

import pytest
import torch
import yaml

from hjepa_benchmark.throughput.step import synthetic_batch
from hjepa_data.masks import MASK_LAWS
from hjepa_pretrain import settings
from hjepa_pretrain.task import build_task


@pytest.mark.parametrize("law", MASK_LAWS)
def test_a_law_trains_and_resumes(pretrain, tiny, tmp_path, capsys, law, read_losses):
    words = [word for word in tiny if not word.startswith("masks.")]
    run = f"run.dir={tmp_path}/run"
    chosen = ("recipe=hjepa", "preset=demo", f"masks={law}", "eval.at_end=false", "run.steps=2")
    finished = pretrain.here(capsys, run, *words, *chosen)
    assert finished.code == 0, finished.err
    stored = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert stored["mask_law"] == law
    config, _ = settings.load([run])
    assert type(config.masks) is MASK_LAWS[law]
    context, targets = build_task(config).draw_masks(0, torch.arange(4))
    assert context.shape[1] == config.masks.num_context_tokens
    assert targets.shape[2] == config.masks.num_target_tokens
    assert pretrain.here(capsys, run, "run.steps=3").code == 0
    assert [step for step, _ in read_losses(tmp_path / "run")] == [1, 2, 3]


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        (["recipe=hjepa"], [0, 1, 2, 3]),
        (["recipe=hjepa_global"], []),
        (["recipe=hjepa_global", "hjepa.prediction=hidden", "hjepa.predict_every=4"], [3]),
        (["recipe=mae"], [0, 1, 2, 3]),
        (["recipe=simclr"], []),
        (["recipe=supervised", "baseline.num_classes=3"], []),
    ],
)
def test_masks_are_drawn_at_the_steps_that_need_them(tiny, monkeypatch, words, steps):
    tiny = [word for word in tiny if not word.startswith("masks.")]
    config, _ = settings.load([*tiny, *words, "preset=demo", "data.train=synthetic"])
    task, drawn = build_task(config), []
    draw = task.draw_masks
    monkeypatch.setattr(task, "draw_masks", lambda step, sample: drawn.append(step) or draw(step, sample))
    batch = synthetic_batch(config, torch.device("cpu"))
    for step in range(4):
        assert task(batch, step).loss.isfinite()
    assert drawn == steps


def test_a_run_keeps_its_law(pretrain, tiny, tmp_path, capsys):
    run = f"run.dir={tmp_path}/run"
    assert pretrain.here(capsys, run, *tiny, "run.steps=1", "eval.at_end=false").code == 0
    changed = pretrain.here(capsys, run, "masks=random")
    assert changed.code == 2
    assert len(changed.err.strip().splitlines()) == 1
    assert changed.message.startswith("hjepa-pretrain: masks=random: the run in ")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["masks=rectangles"], ["masks=rectangles", "multiblock", "released"]),
        (["masks=random", "masks.num_targets=2"], ["masks.num_targets", "masks=NAME"]),
        (["masks.levl=2"], ["masks.levl", "masks.level"]),
        (["mask_law=random"], ["mask_law", "masks"]),
        (["recipe=hjepa", "masks=random", "masks.context_tokens=12"], ["context_tokens=12", "allowed"]),
    ],
)
def test_wrong_words(pretrain, capsys, words, expected):
    finished = pretrain.here(capsys, *words)
    assert finished.code == 2
    assert all(word in finished.message for word in expected), finished.message


def test_masks_that_nobody_draws_need_not_fit_the_image(pretrain, tiny, tmp_path, capsys):
    tiny = [word for word in tiny if not word.startswith(("masks.", "data.image_size"))]
    small = (*tiny, "data.image_size=[16,16]", "masks.target_tokens=3", "eval.at_end=false", "run.steps=1")
    assert pretrain.here(capsys, f"run.dir={tmp_path}/view", *small).code == 0
    hidden = pretrain.here(capsys, f"run.dir={tmp_path}/hidden", "hjepa.prediction=hidden", *small)
    assert hidden.code == 2
    assert "target_tokens=3" in hidden.message
