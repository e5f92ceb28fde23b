"""What can be looked at before a run, and what ends one early."""

import json
import re

import pytest
import yaml

from hjepa_pretrain.task import PretrainTask

PNG = b"\x89PNG"


@pytest.fixture
def plan(pretrain, tiny, tmp_path, capsys):
    def run(*words):
        return pretrain.here(capsys, f"run.dir={tmp_path}/run", f"plan.dir={tmp_path}/plan", *tiny, *words)

    return run


def test_the_schedules_are_drawn_and_nothing_is_run(plan, tmp_path):
    done = plan(
        "plan.show=true", "recipe=hjepa", "run.steps=100", "trainer.ema_momentum.horizon=0.1", "data.views=1",
        "hjepa.level_weights.kind=curriculum", "trainer.learning_rate.value=0.5", "trainer.learning_rate.final=0",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert (tmp_path / "plan" / "schedules.png").read_bytes().startswith(PNG)
    assert not (tmp_path / "run").exists()
    lines = {re.split(r"\s{2,}", line.strip())[0]: line.split() for line in done.out.splitlines() if line.strip()}
    assert lines["EMA momentum"][2] == "0.9"  # an average over a tenth of the run
    assert lines["learning rate"][3] == "0.5"  # at the end of the warm-up
    assert float(lines["weight decay"][-1]) == pytest.approx(0.4, abs=0.01)
    assert [lines[f"level {level} weight"][3] for level in (0, 1, 2)] == ["0", "0", "0"]
    assert lines["level 2 weight"][-1] == "0.5"


def test_warm_up_may_count_samples_and_epochs(plan):
    by_steps = plan("plan.show=true", "run.steps=100", "trainer.learning_rate.warmup_steps=19")
    by_epochs = plan(
        "plan.show=true", "run.steps=100", "trainer.learning_rate.warmup_steps=1", "trainer.learning_rate.unit=epochs"
    )  # one epoch of 300 images is 18.75 steps of 16
    assert by_epochs.code == 0, by_epochs.err
    assert by_epochs.out == by_steps.out


@pytest.mark.slow
def test_a_learning_rate_is_suggested_and_nothing_is_saved(plan, tmp_path):
    done = plan("plan.find_lr=true", "plan.find_lr_steps=25", "plan.find_lr_low=1e-5", "trainer.precision=fp32")
    assert done.code == 0, done.err
    assert (tmp_path / "plan" / "learning_rate.png").read_bytes().startswith(PNG)
    assert re.search(r"trainer\.learning_rate\.value=\S+: the loss falls fastest|no suggestion", done.out), done.out
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "steps"),
    [
        (["recipe=hjepa", "data.views=1", "hjepa.level_weights.kind=curriculum"], range(29, 34)),
        (["recipe=hjepa_global", "hjepa.predict_every=4"], range(27, 47, 4)),
    ],
    ids=["curriculum", "every fourth"],
)
def test_a_learning_rate_is_looked_for_at_the_fullest_steps_of_the_run(plan, monkeypatch, words, steps):
    seen, forward = [], PretrainTask.forward

    def watched(self, batch, step):
        seen.append(step)
        return forward(self, batch, step)

    monkeypatch.setattr(PretrainTask, "forward", watched)
    done = plan("plan.find_lr=true", "plan.find_lr_steps=12", "plan.find_lr_high=1e-4", "run.steps=30", *words)
    assert done.code == 0, done.err
    assert seen[:5] == list(steps)


def test_a_sweep_without_a_range_is_one_line(plan):
    done = plan("plan.find_lr=true", "plan.find_lr_low=2")
    assert done.code == 2
    assert "plan.find_lr_low=2" in done.message


@pytest.mark.slow
def test_a_run_that_diverges_ends_with_code_3_and_a_dump(plan, tmp_path):
    done = plan("trainer.learning_rate.value=1e30", "trainer.learning_rate.warmup_steps=0", "trainer.guard.max_skips=1")
    assert done.code == 3, done.err
    assert "is not finite, for 2 steps in a row" in done.message
    (dump,) = (tmp_path / "run" / "dumps").glob("*/rank0.json")
    told = json.loads(dump.read_text())["steps"][-1]
    assert len(told["sample"]) == 16
    assert told["skipped"]


@pytest.mark.slow
def test_early_stop_ends_a_run_as_done_and_it_stays_so(plan, tmp_path, read_losses):
    stop = "early_stop={metric: train/loss, mode: min, min_delta: 1000, patience: 2}"
    assert plan("data.eval=null", stop).code == 0
    assert read_losses(tmp_path / "run")[-1][0] == 3
    assert (tmp_path / "run" / "report.html").is_file()
    assert plan().code == 0
    assert read_losses(tmp_path / "run")[-1][0] == 3
    assert plan("early_stop=null", "run.steps=4").code == 0
    assert read_losses(tmp_path / "run")[-1][0] == 4


@pytest.mark.slow
def test_every_level_is_measured_on_the_way(plan, tmp_path, read_rows):
    done = plan("eval.every_steps=2", "eval.online_samples=40", "eval.k=5", "run.steps=2", "eval.at_end=false")
    assert done.code == 0, done.err
    row = next(row for row in read_rows(tmp_path / "run") if row["step"] == 2)
    for level in ("encoder", "0", "1", "global"):
        assert 0 <= row[f"eval/{level}/knn_5"] <= 1
        assert row[f"eval/{level}/rankme"] >= 1


@pytest.mark.slow
def test_loggers_are_chosen(plan, tmp_path, monkeypatch):
    done = plan("loggers=[tensorboard]", "run.steps=1", "eval.at_end=false")
    assert done.code == 0, done.err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert list((tmp_path / "run").glob("events.*"))
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["loggers"] == ["tensorboard"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = plan("loggers=[jsonl,wandb]")
    assert done.code == 2
    assert "pip install 'hjepa-train[wandb]'" in done.message
    done = plan("loggers=[paper]")
    assert done.code == 2
    assert "paper" in done.message
