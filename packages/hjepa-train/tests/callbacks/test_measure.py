"""Measurements on the way, and the time that they take of a run that has a limit."""

import time

import pytest

from hjepa_train import Callback, Measure, Outcome, ParallelConfig, TimeLimit, Trainer, TrainerConfig
from hjepa_train.testing import ArithmeticStream, ToyModule

MEASUREMENT = 10.0


class Clock(Callback):
    """A step takes a second."""

    def __init__(self, monkeypatch, stop_at=None):
        self.now, self.stop_at = 0.0, stop_at
        monkeypatch.setattr(time, "monotonic", lambda: self.now)

    def on_step_end(self, trainer, result):
        self.now += 1.0
        if trainer.step == self.stop_at:
            trainer.request_stop("a test")


class Rows(Callback):
    def __init__(self):
        self.measured = {}

    def on_row(self, trainer, row):
        self.measured |= {int(row["step"]): row[name] for name in row if name == "eval/x"}


@pytest.fixture
def sit(device, tmp_path, monkeypatch):
    """Train for some seconds; return the outcome, the step reached, the seconds taken and what was measured."""

    def run(limit, stop_at=None):
        clock, rows = Clock(monkeypatch, stop_at), Rows()

        def measure(trainer):
            clock.now += MEASUREMENT
            return {"eval/x": float(trainer.step)}

        config = TrainerConfig(steps=10, precision="fp32", parallel=ParallelConfig(device=device.type))
        callbacks = [clock, Measure(5, measure), rows, TimeLimit(limit / 60.0, started=0.0)]
        trainer = Trainer(ToyModule(), ArithmeticStream(), config, run_dir=tmp_path, callbacks=callbacks)
        return trainer.fit(), trainer.step, clock.now, rows.measured

    return run


def test_a_measurement_that_the_time_limit_would_cut_is_left_to_the_next_sitting(sit):
    # 10 s before the first step and a second a step: another 10 s after the fifth would be too long.
    assert sit(24.0) == (Outcome.PREEMPTED, 4, 14.0, {1: 0.0})
    # This sitting begins with a step that has a measurement.
    assert sit(24.0) == (Outcome.PREEMPTED, 9, 15.0, {5: 5.0})
    assert sit(5.0) == (Outcome.DONE, 10, 11.0, {10: 10.0})


def test_a_measurement_for_which_there_is_time_is_taken(sit):
    assert sit(27.0) == (Outcome.PREEMPTED, 7, 27.0, {1: 0.0, 5: 5.0})


def test_how_long_it_took_is_known_to_the_next_sitting(sit):
    assert sit(600.0, stop_at=7)[:2] == (Outcome.PREEMPTED, 7)
    assert sit(11.0) == (Outcome.PREEMPTED, 9, 2.0, {})
