import time

import pytest

from hjepa_train import Callback, CheckpointConfig, ParallelConfig, Trainer, TrainerConfig
from hjepa_train.testing import ArithmeticStream, ToyModule
from hjepa_train.throughput import Throughput


def test_speed_leaves_pauses_out_and_counts_waiting(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = Throughput()
    clock.start(step=10, samples=1000)
    with clock.waiting():
        now[0] += 0.5
    now[0] += 1.5
    with clock.paused():
        now[0] += 50.0
    assert clock.waited == 0.5
    speed = clock.read(step=14, samples=1080)
    assert (speed.seconds, speed.images_per_second, speed.step_ms) == (2.0, 40.0, 500.0)
    assert clock.waited == 0.0
    now[0] += 1.0
    assert clock.read(step=15, samples=1100).images_per_second == pytest.approx(20.0)


def test_rows_tell_waiting_from_working_and_from_saving(device, tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    class Slow(ArithmeticStream):
        def __iter__(self):
            for batch in super().__iter__():
                now[0] += 0.03
                yield batch

    class SlowModule(ToyModule):
        def forward(self, batch, step):
            now[0] += 0.01
            return super().forward(batch, step)

    class SlowCallback(Callback):
        rows = ()

        def on_step_end(self, trainer, result):
            now[0] += 0.4

        def on_save(self, trainer):
            now[0] += 5.0

        def on_row(self, trainer, row):
            self.rows = (*self.rows, row)

    config = TrainerConfig(steps=4, log_every=1, precision="fp32", parallel=ParallelConfig(device=device.type))
    slow = SlowCallback()
    cadence = CheckpointConfig(every_steps=1)
    Trainer(SlowModule(), Slow(), config, run_dir=tmp_path, callbacks=[slow], checkpoint=cadence).fit()
    first, last = slow.rows[0], slow.rows[-1]
    assert first["train/data_wait"] == pytest.approx(0.75)  # also for the batch with which the stream begins
    assert last["train/step_ms"] == pytest.approx(40)
    assert last["train/data_wait"] == pytest.approx(0.75)
    assert last["checkpoint/stall_seconds"] == pytest.approx(5)
    assert last["train/images_per_second"] == pytest.approx(16 / last["train/step_ms"] * 1000, rel=1e-6)
    # A row of two steps has the stalls of both.
    config.log_every, slow.rows = 2, ()
    Trainer(SlowModule(), Slow(), config, run_dir=tmp_path / "two", callbacks=[slow], checkpoint=cadence).fit()
    assert slow.rows[-1]["checkpoint/stall_seconds"] == pytest.approx(10)
