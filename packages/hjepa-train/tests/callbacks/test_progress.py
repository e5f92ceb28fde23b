import io
import json

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hjepa_train import (
    Callback,
    CheckpointConfig,
    CheckpointError,
    MetricsLog,
    ParallelConfig,
    Profiler,
    ProfilerConfig,
    ProgressBar,
    TensorBoardLog,
    Trainer,
    TrainerConfig,
)
from hjepa_train.callbacks.metrics import keep_rows
from hjepa_train.testing import ArithmeticStream, ToyModule


def train(device, callbacks, *, steps=6, run_dir=None):
    config = TrainerConfig(steps=steps, log_every=2, precision="fp32", parallel=ParallelConfig(device=device.type))
    cadence = CheckpointConfig(every_steps=2)
    trainer = Trainer(ToyModule(), ArithmeticStream(), config, run_dir=run_dir, callbacks=callbacks, checkpoint=cadence)
    trainer.fit()
    return trainer


def test_rows_are_json_with_the_promised_names(device, tmp_path):
    train(device, [MetricsLog(tmp_path / "run" / "metrics.jsonl")])
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 4, 6]
    assert {"step", "train/loss", "train/loss_level_0", "train/images_per_second"} <= rows[0].keys()
    assert {"train/lr", "train/weight_decay", "train/ema_momentum", "train/grad_norm"} <= rows[0].keys()


def test_what_is_not_finite_is_null(device, tmp_path):
    class Broken(Callback):
        def on_step_end(self, trainer, result):
            trainer.log({"monitor/x": float("nan")})

    path = tmp_path / "metrics.jsonl"
    train(device, [MetricsLog(path), Broken()], steps=1)
    row = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert row["monitor/x"] is None


def test_rows_after_a_step_and_a_torn_line_go(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    keep_rows(path, last_step=2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    keep_rows(tmp_path / "none.jsonl", last_step=2)


def test_a_row_that_cannot_be_written_is_one_line(device, tmp_path):
    class Full(MetricsLog):
        def on_row(self, trainer, row):
            raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match=r"step 1: metrics not written .*make room") as caught:
        train(device, [Full(tmp_path / "metrics.jsonl")])
    assert "\n" not in str(caught.value)


def test_tensorboard_shows_each_step_once(device, tmp_path):
    train(device, [TensorBoardLog(tmp_path)], steps=4, run_dir=tmp_path)
    train(device, [TensorBoardLog(tmp_path)], steps=6, run_dir=tmp_path)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 4, 6]


def test_plain_lines_where_there_is_no_terminal(device):
    output = io.StringIO()
    train(device, [ProgressBar(every_seconds=0.0, console=Console(file=output))])
    lines = output.getvalue().splitlines()
    assert len(lines) == 4
    assert lines[-1].startswith("step 6/6  loss ")
    assert "images/s" in lines[-1]
    assert lines[-1].endswith("0:00 left")


def test_a_bar_on_a_terminal(device):
    output = io.StringIO()
    train(device, [ProgressBar(console=Console(file=output, force_terminal=True, width=100))])
    assert "step 6/6" in output.getvalue()
    assert "images/s" in output.getvalue()


def test_the_profiler_writes_a_trace_that_tensorboard_reads(device, tmp_path):
    train(device, [Profiler(tmp_path, ProfilerConfig(wait=1, warmup=1, active=2))])
    (path,) = tmp_path.glob("*.pt.trace.json")
    assert path.name.startswith("rank0.")
    trace = json.loads(path.read_text())
    assert {"schemaVersion", "traceEvents", "deviceProperties"} <= trace.keys()
    names = {event.get("name", "") for event in trace["traceEvents"]}
    assert any(name.startswith("ProfilerStep#") for name in names)
    assert "aten::addmm" in names
    assert {"ph", "name", "ts", "dur", "cat"} <= next(e.keys() for e in trace["traceEvents"] if e["ph"] == "X")


def test_a_run_that_ends_before_the_profile_is_no_error(device, tmp_path):
    train(device, [Profiler(tmp_path, ProfilerConfig(wait=100))], steps=2)
    assert not list(tmp_path.glob("*.json"))


def test_a_wrong_profile_is_refused():
    with pytest.raises(ValueError, match="active=0"):
        ProfilerConfig(active=0)
