import json
import logging

import pytest

from hjepa_train import (
    EarlyStop,
    EarlyStopConfig,
    Measure,
    MetricsLog,
    Outcome,
    ParallelConfig,
    Trainer,
    TrainerConfig,
)
from hjepa_train.testing import ArithmeticStream, ToyModule

VALUES = [0.1, 0.2, 0.3, 0.3, 0.25, 0.3, 0.5, 0.6, 0.6, 0.6, 0.6, 0.6]


def train(device, folder, *, steps=12, stop_at=None, values=VALUES, **fields):
    def measure(trainer):
        if stop_at is not None and trainer.step == stop_at:
            trainer.request_stop("a test")
        return {"eval/x": values[min(trainer.step, len(values) - 1)]}

    config = TrainerConfig(steps=steps, log_every=100, precision="fp32", parallel=ParallelConfig(device=device.type))
    callbacks = [Measure(1, measure), EarlyStop(EarlyStopConfig(**({"metric": "eval/x", "patience": 3} | fields)))]
    callbacks.append(MetricsLog(folder / "metrics.jsonl"))
    trainer = Trainer(ToyModule(), ArithmeticStream(), config, run_dir=folder, callbacks=callbacks)
    return trainer, trainer.fit()


def test_a_run_ends_as_done_when_nothing_gets_better_and_stays_so(device, tmp_path):
    trainer, outcome = train(device, tmp_path)
    assert (outcome, trainer.step) == (Outcome.DONE, 5)
    assert trainer.store.newest().state["step"] == 5
    trainer, outcome = train(device, tmp_path)
    assert (outcome, trainer.step) == (Outcome.DONE, 5)
    trainer, outcome = train(device, tmp_path, patience=5)
    assert (outcome, trainer.step) == (Outcome.DONE, 12)


@pytest.mark.parametrize("stop", range(1, 5))
def test_a_resumed_run_ends_at_the_same_step(device, tmp_path, stop):
    _, outcome = train(device, tmp_path, stop_at=stop)
    assert outcome is Outcome.PREEMPTED
    trainer, outcome = train(device, tmp_path)
    assert (outcome, trainer.step) == (Outcome.DONE, 5)


def test_another_metric_or_mode_begins_anew(device, tmp_path, caplog):
    assert train(device, tmp_path)[0].step == 5
    with caplog.at_level(logging.INFO):
        trainer, outcome = train(device, tmp_path, mode="min")
    assert (outcome, trainer.step) == (Outcome.DONE, 9)
    (line,) = [record.message for record in caplog.records if "begins anew" in record.message]
    assert "metric=eval/x, mode=min; the checkpoint has metric=eval/x, mode=max" in line
    assert train(device, tmp_path, metric="train/loss", min_delta=1e9)[0].step == 12


def test_a_state_that_does_not_name_its_metric_is_taken_over():
    stopper = EarlyStop(EarlyStopConfig(metric="eval/x"))
    stopper.load_state_dict({"best": 0.5, "best_step": 3, "waited": 2})
    named = {"metric": "eval/x", "mode": "max", "best": 0.5, "best_step": 3, "waited": 2}
    assert stopper.state_dict() == named


def test_less_may_be_better_and_a_hair_may_not_count(device, tmp_path):
    assert train(device, tmp_path / "min", mode="min", patience=2)[0].step == 3
    assert train(device, tmp_path / "delta", min_delta=0.15, patience=5)[0].step == 11
    assert train(device, tmp_path / "nan", values=[float("nan")])[0].step == 3


def test_measuring_is_before_at_every_nth_and_after(device, tmp_path):
    seen = []
    config = TrainerConfig(steps=5, precision="fp32", parallel=ParallelConfig(device=device.type))
    measure = Measure(2, lambda trainer: seen.append(trainer.step) or {"eval/x": 1.0})
    callbacks = [measure, MetricsLog(tmp_path / "metrics.jsonl")]
    Trainer(ToyModule(), ArithmeticStream(), config, callbacks=callbacks).fit()
    assert seen == [0, 2, 4, 5]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "eval/x" in row] == [1, 2, 4, 5]


def test_a_metric_that_never_came_is_said(device, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        train(device, tmp_path, metric="eval/y", steps=2)
    assert "no row had metric=eval/y" in caplog.text


def test_a_metric_that_is_misspelt_is_said_once_at_the_first_row_of_its_kind(device, tmp_path, caplog):
    def lines():
        return [record.message for record in caplog.records if "is not among" in record.message]

    train(device, tmp_path / "other", metric="monitor/0/rankme", steps=3)
    train(device, tmp_path / "right", steps=3)
    assert lines() == []
    train(device, tmp_path / "wrong", metric="eval/y", steps=3)
    assert lines() == ["step 1: early stop: metric=eval/y is not among what this row has: eval/x"]


@pytest.mark.parametrize(
    "fields", [{"patience": 0}, {"mode": "up"}, {"min_delta": -1.0}, {"min_delta": float("nan")}, {"metric": ""}]
)
def test_a_wrong_early_stop_is_refused(fields):
    with pytest.raises(ValueError, match="allowed"):
        EarlyStopConfig(**({"metric": "x"} | fields))
