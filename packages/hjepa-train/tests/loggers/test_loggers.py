import errno
import json
import os
import shutil
import struct
import time
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hjepa_train import (
    Callback,
    CheckpointError,
    LoggerConfig,
    MetricsLog,
    MLflowLog,
    Outcome,
    TensorBoardLog,
    WandbLog,
    World,
    build_loggers,
)
from hjepa_train.loggers.jsonl import keep_rows


def test_rows_are_json_with_the_promised_names(train, tmp_path):
    train([MetricsLog(tmp_path / "run" / "metrics.jsonl")])
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 4, 6]
    assert {"step", "train/loss", "train/loss_level_0", "train/images_per_second"} <= rows[0].keys()
    assert {"train/lr", "train/weight_decay", "train/ema_momentum", "train/grad_norm"} <= rows[0].keys()


def test_what_is_not_finite_is_null(train, tmp_path):
    class Broken(Callback):
        def on_step_end(self, trainer, result):
            trainer.log({"monitor/x": float("nan")})

    path = tmp_path / "metrics.jsonl"
    train([MetricsLog(path), Broken()], steps=1)
    row = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert row["monitor/x"] is None


def test_rows_after_a_step_and_a_torn_line_go(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    keep_rows(path, last_step=2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    keep_rows(tmp_path / "none.jsonl", last_step=2)


def test_rows_are_on_the_disk_before_they_take_the_place_of_the_old_ones(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')

    def broken(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output"):
        keep_rows(path, last_step=1)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_row_that_cannot_be_written_is_one_line(train, device, tmp_path):
    class Full(MetricsLog):
        def on_row(self, trainer, row):
            raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match=r"step 1: metrics not written .*make room") as caught:
        train([Full(tmp_path / "metrics.jsonl")])
    assert "\n" not in str(caught.value)


def test_tensorboard_shows_each_step_once(train, tmp_path):
    train([TensorBoardLog(tmp_path)], steps=4, run_dir=tmp_path)
    train([TensorBoardLog(tmp_path)], steps=6, run_dir=tmp_path)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 4, 6]


def test_tensorboard_forgets_a_run_that_died_before_its_first_checkpoint(train, tmp_path):
    with pytest.raises(RuntimeError, match="power cut"):
        train([TensorBoardLog(tmp_path), StopAt(5)])
    train([TensorBoardLog(tmp_path)])
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 4, 6]


class StopAt(Callback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, trainer, result):
        if trainer.step == self.step:
            raise RuntimeError("power cut")


def wandb_history(folder):
    """Read the rows in W&B's files: a log in blocks of 32 KiB, each record with a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2 as proto

    rows = []
    for path in folder.glob("wandb/offline-run-*/run-*.wandb"):
        data, place, content = path.read_bytes(), 7, b""
        while place + 7 <= len(data):
            if 32768 - place % 32768 < 7:
                place += 32768 - place % 32768
                continue
            _, length, kind = struct.unpack("<IHB", data[place : place + 7])
            if place + 7 + length > len(data):
                break
            content += data[place + 7 : place + 7 + length]
            place += 7 + length
            if kind in (1, 4):  # whole, or the last part
                record = proto.Record()
                record.ParseFromString(content)
                content = b""
                if record.WhichOneof("record_type") == "history":
                    items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                    rows.append((int(items["_step"]), json.loads(items["train/loss"])))
    # By step: the folders are named by the clock, which may be set back between two sittings.
    return sorted(rows)


@pytest.mark.slow
def test_wandb_offline_goes_on_in_the_same_run(train, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")

    def log():
        return [WandbLog(tmp_path, project="tests", settings={"a.b": 1}), MetricsLog(tmp_path / "metrics.jsonl")]

    with pytest.raises(RuntimeError, match="power cut"):
        train([*log(), StopAt(4)], run_dir=tmp_path)
    trainer = train(log(), run_dir=tmp_path)
    assert len({path.name for path in tmp_path.glob("wandb/offline-run-*/run-*.wandb")}) == 1
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    expected = [(row["step"], row["train/loss"]) for row in rows]
    # W&B's own process writes the file, and a busy machine may still be at it when the run is closed.
    deadline = time.monotonic() + 120
    while (history := wandb_history(tmp_path)) != expected and time.monotonic() < deadline:
        time.sleep(0.2)
    assert history == expected
    assert trainer.callbacks[0].state_dict()["id"]


def test_a_wandb_without_a_key_is_one_line(train, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")

    def init(**_):
        raise wandb.errors.UsageError("No API key configured.\nUse `wandb login` to log in.")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(ValueError, match=r"loggers=wandb: No API key .*WANDB_MODE=offline") as caught:
        train([WandbLog(tmp_path, project="tests")])
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_mlflow_in_a_folder_goes_on_in_the_same_run(train, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "store").as_uri()

    def log():
        return [MLflowLog(uri, experiment="tests", name="one", settings={"a.b": 1}), MetricsLog(tmp_path / "m.jsonl")]

    with pytest.raises(RuntimeError, match="power cut"):
        # Rows 2 and 4 are there when it dies, and the checkpoint of step 2 alone.
        train([*log(), StopAt(5)], run_dir=tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "step_00000004")
    (name,) = train(log(), run_dir=tmp_path).callbacks[0].state_dict().values()
    client = mlflow.MlflowClient(tracking_uri=uri)
    run = client.get_run(name)
    assert (run.info.status, run.info.run_name, run.data.params) == ("FINISHED", "one", {"a.b": "1"})
    history = [(metric.step, metric.value) for metric in client.get_metric_history(name, "train/loss")]
    rows = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert sorted(history) == [(row["step"], row["train/loss"]) for row in rows]


def test_an_mlflow_that_is_not_there_is_one_line(train, tmp_path):
    pytest.importorskip("mlflow")
    with pytest.raises(ValueError, match=r"mlflow_uri=nonsense://x: .*allowed: a server") as caught:
        train([MLflowLog("nonsense://x", experiment="tests")])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("variable", "expected"),
    [("nonsense://y", "MLFLOW_TRACKING_URI=nonsense://y: "), (None, "mlflow_uri=null and no MLFLOW_TRACKING_URI, so ")],
)
def test_an_mlflow_that_no_setting_names_says_where_it_was_looked_for(train, monkeypatch, variable, expected):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    if variable is not None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", variable)

    def refused(**_):
        raise mlflow.exceptions.MlflowException("No store for it. More.")

    # The whole package would make the default, a database in the working folder.
    monkeypatch.setattr(mlflow, "MlflowClient", refused)
    with pytest.raises(ValueError, match="No store for it; allowed: a server") as caught:
        train([MLflowLog(None, experiment="tests")])
    assert str(caught.value).startswith(expected)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["jsonl", "tensorboard", "wandb", "mlflow"])
def test_the_main_rank_alone_logs(kind, tmp_path, monkeypatch):
    if kind in ("wandb", "mlflow"):
        pytest.importorskip(kind)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    (log,) = build_loggers((kind,), tmp_path / "run", LoggerConfig(mlflow_uri=(tmp_path / "store").as_uri()))
    other = SimpleNamespace(world=World(rank=1, size=2), step=0)
    log.on_fit_start(other)
    log.on_row(other, {"step": 1, "train/loss": 1.0})
    log.on_fit_end(other, Outcome.DONE)
    assert not [*tmp_path.iterdir()]


def test_loggers_are_chosen_by_name(tmp_path, monkeypatch):
    kinds = [type(log) for log in build_loggers(("tensorboard", "jsonl"), tmp_path)]
    assert kinds == [TensorBoardLog, MetricsLog]
    with pytest.raises(ValueError, match="loggers=paper: unknown; allowed: tensorboard, jsonl, wandb, mlflow"):
        build_loggers(("paper",), tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for kind in ("wandb", "mlflow"):
        with pytest.raises(ValueError, match=rf"loggers={kind}: .*pip install 'hjepa-train\[{kind}\]'"):
            build_loggers((kind,), tmp_path)
