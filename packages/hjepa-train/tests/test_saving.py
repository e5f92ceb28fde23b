"""Checkpoints are written while the training goes on, and what goes wrong there is not lost."""

import errno
import json
import logging
import re
import threading
import time

import pytest
import torch

from hjepa_train import Callback, CheckpointConfig, CheckpointError, Outcome, ParallelConfig, Trainer, TrainerConfig
from hjepa_train.checkpoint import store as store_module
from hjepa_train.testing import ArithmeticStream, ToyModule


def build(device, folder, callbacks=(), steps=10, **cadence):
    config = TrainerConfig(steps=steps, log_every=1, parallel=ParallelConfig(device=device.type))
    saving = CheckpointConfig(**({"every_steps": 4, "every_minutes": None} | cadence))
    return Trainer(ToyModule(), ArithmeticStream(), config, run_dir=folder, callbacks=callbacks, checkpoint=saving)


class Rows(Callback):
    def __init__(self):
        self.rows = []

    def on_row(self, trainer, row):
        self.rows.append(row)


class Reached(Callback):
    """Tells that a step has ended."""

    def __init__(self, step):
        self.step, self.event = step, threading.Event()

    def on_step_end(self, trainer, result):
        if trainer.step == self.step:
            self.event.set()


@pytest.fixture
def slow_disk(monkeypatch):
    """A disk that writes no tensor before a step is reached: the callback that tells it so."""
    reached, write = Reached(6), store_module.write_tensors

    def slow(*arguments):
        assert reached.event.wait(300), "the training waited for the disk"
        return write(*arguments)

    monkeypatch.setattr(store_module, "write_tensors", slow)
    return reached


def test_steps_go_on_while_a_checkpoint_is_written(device, tmp_path, slow_disk, caplog):
    rows = Rows()
    trainer = build(device, tmp_path, [rows, slow_disk], steps=7, keep=None)
    with caplog.at_level(logging.INFO):
        trainer.fit()
    assert [path.name for path in trainer.store.paths()] == ["step_00000007", "step_00000004"]
    assert torch.equal(trainer.store.at(7).tensors()["model/mask_token"], trainer.module.mask_token.detach().cpu())
    lines = [record.message for record in caplog.records if "checkpoint" in record.message]
    assert [re.sub(r"\d+\.\d+", "x", line).split(" (")[0] for line in lines] == [
        "checkpoint of step 4: training stalled x s",
        "checkpoint of step 7: training stalled x s",
        "checkpoint of step 7: waited x s more until it was written",
        "2 checkpoints: training stalled x s each",
    ]
    assert any("checkpoint/stall_seconds" in row and "train/loss" in row for row in rows.rows)


def test_the_wait_for_the_last_checkpoint_is_told(device, tmp_path, monkeypatch, caplog):
    trainer = build(device, tmp_path, steps=2)
    write, now, waiting = store_module.write_tensors, [0.0], threading.Event()
    wait = trainer._saver.wait

    def wait_and_tell():
        if trainer._saver._thread is not None:
            waiting.set()
        wait()

    def slow(*arguments):
        assert waiting.wait(300)
        now[0] += 0.5
        return write(*arguments)

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(store_module, "write_tensors", slow)
    monkeypatch.setattr(trainer._saver, "wait", wait_and_tell)
    with caplog.at_level(logging.INFO):
        trainer.fit()
    assert trainer._saver.times.stalls == [0.5]
    assert "checkpoint of step 2: waited 0.500 s more until it was written" in caplog.messages


class Counts(Callback):
    def __init__(self):
        self.steps = []

    def state_dict(self):
        return {"steps": self.steps}

    def on_step_end(self, trainer, result):
        self.steps.append(trainer.step)


def test_a_checkpoint_holds_what_callbacks_held_at_its_step(device, tmp_path, slow_disk):
    trainer = build(device, tmp_path, [Counts(), slow_disk], steps=7, keep=None)
    trainer.fit()
    states = json.dumps(trainer.store.at(4).state)
    assert '"steps": [1, 2, 3, 4]' in states


def test_a_disk_that_fills_in_the_background_ends_the_run(device, tmp_path, monkeypatch):
    trainer = build(device, tmp_path, steps=1000, every_steps=5)
    write, written = store_module.write_tensors, []

    def full(path, parts):
        if written:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        return write(path, parts)

    monkeypatch.setattr(store_module, "write_tensors", full)
    with pytest.raises(CheckpointError, match=r"not saved \(.*No space left.*whole: step_00000005; make room"):
        trainer.fit()
    assert trainer.step < 1000
    monkeypatch.undo()
    again = build(device, tmp_path, steps=12)
    assert again.fit() is Outcome.DONE
    assert again.store.newest().state["step"] == 12


def test_some_checkpoints_stay_for_good(device, tmp_path):
    trainer = build(device, tmp_path, steps=10, every_steps=1, keep=2, keep_every_steps=4)
    trainer.fit()
    assert [path.name[-2:] for path in trainer.store.paths()] == ["10", "09", "08", "04"]


@pytest.mark.parametrize("every", [None, 2])
def test_checkpoints_that_stay_are_written_whatever_the_cadence_of_the_others(device, tmp_path, every):
    trainer = build(device, tmp_path, steps=10, every_steps=every, keep=1, keep_every_steps=3)
    trainer.fit()
    assert [path.name[-2:] for path in trainer.store.paths()] == ["10", "09", "06", "03"]
