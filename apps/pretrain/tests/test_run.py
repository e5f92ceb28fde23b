"""Runs in odd folders, stopped at odd moments, begun again; in this process, on shards of a few images."""

import errno
import io
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest

from hjepa_pretrain import demo
from hjepa_pretrain import run as run_module
from hjepa_pretrain.cli import main
from hjepa_pretrain.demo.shards import write_demo_shards
from hjepa_pretrain.failures import judge
from hjepa_pretrain.model import save_model
from hjepa_train import Callback

TINY = (
    "preset=demo", "recipe=hjepa_contrast", "model=vit_nano_patch8", "hjepa.encoder.embed_dim=32",
    "hjepa.encoder.num_heads=2", "hjepa.encoder.depth=1", "hjepa.predictor.embed_dim=16", "hjepa.predictor.num_heads=2",
    "data.batch_size=16", "data.cache_mib=0", "run.steps=1", "run.threads=1", "eval.every_steps=null",
    "eval.at_end=false", "loggers=[jsonl]",
)  # fmt: skip


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_demo_shards(demo.compose_demo("train", 32, seed=7), folder, "train")
    return (f"data.train={folder}/train-*.tar", *TINY)


def said(capsys):
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return [line for line in err.splitlines() if line.startswith("hjepa-pretrain: ")]


def test_the_results_of_a_run_that_begins_again_are_new(words, tmp_path, caplog):
    folder = tmp_path / "run"
    assert main([f"run.dir={folder}", *words]) == 0
    before = (folder / "model.safetensors").read_bytes()
    shutil.rmtree(folder / "checkpoints")
    (folder / "results.json").unlink()
    assert main([f"run.dir={folder}", "trainer.learning_rate.value=0.1"]) == 0
    assert "holds no checkpoint: the run begins again" in caplog.text
    assert "data.eval: not given, so nothing is measured" in caplog.text
    assert (folder / "model.safetensors").read_bytes() != before


def test_a_terminal_that_has_not_all_letters_is_told_them(words, tmp_path, monkeypatch):
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", shown)
    folder = tmp_path / "rün"
    assert main([f"run.dir={folder}", *words]) == 0
    assert rb"r\xfcn" in shown.buffer.getvalue()
    assert "rün" in (folder / "report.html").read_text(encoding="utf-8")


def test_fewer_steps_than_a_checkpoint_has_are_refused_by_the_name_that_was_given(words, tmp_path, capsys):
    folder = f"run.dir={tmp_path / 'run'}"
    assert main([*words, folder, "run.steps=2"]) == 0
    capsys.readouterr()
    assert main([folder, "run.steps=1"]) == 2
    assert "hjepa-pretrain: run.steps=1: " in capsys.readouterr().err


def test_the_name_of_a_folder_is_no_markup(words, tmp_path, capsys):
    folder = tmp_path / "a [b] c[/d] :smile:"
    assert main([f"run.dir={folder}", *words]) == 0
    assert str(folder) in capsys.readouterr().out
    assert (folder / "report.html").is_file()


@pytest.mark.slow
def test_mlflow_gets_project_name_and_settings(words, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "store").as_uri()
    service = ("loggers=[mlflow]", "logger.project=garments", "logger.name=first", f"logger.mlflow_uri={uri}")
    assert main([f"run.dir={tmp_path}/run", *words, *service]) == 0
    client = mlflow.MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name("garments").experiment_id])
    assert (run.info.run_name, run.info.status) == ("first", "FINISHED")
    params = run.data.params
    assert (params["recipe"], params["hjepa.encoder.embed_dim"]) == ("hjepa_contrast", "32")
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "train/loss")] == [1]


@pytest.mark.slow
def test_wandb_gets_project_name_and_settings(words, tmp_path, monkeypatch):
    wandb, opened = pytest.importorskip("wandb"), []
    monkeypatch.setenv("WANDB_MODE", "offline")
    init = wandb.init
    monkeypatch.setattr(wandb, "init", lambda **given: opened.append(init(**given)) or opened[-1])
    service = ("loggers=[wandb]", "logger.project=garments", "logger.name=first")
    assert main([f"run.dir={tmp_path}/run", *words, *service]) == 0
    (run,) = opened
    assert (run.project, run.name) == ("garments", "first")
    assert (run.config["recipe"], run.config["hjepa.encoder.embed_dim"]) == ("hjepa_contrast", 32)
    assert list((tmp_path / "run").glob("wandb/offline-run-*/run-*.wandb"))


@pytest.mark.parametrize(
    ("name", "moment"),
    [("SIGINT", "run.open_sources"), ("SIGUSR1", "run.open_sources"), ("SIGTERM", "report.write_report")],
)
def test_a_signal_before_or_after_the_training_is_an_early_stop(words, tmp_path, capsys, monkeypatch, name, moment):
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}

    def killed(*_):
        os.kill(os.getpid(), getattr(signal, name))

    with monkeypatch.context() as patch:
        patch.setattr(f"hjepa_pretrain.{moment}", killed)
        assert main([f"run.dir={tmp_path}/run", *words]) == 75
    (line,) = said(capsys)
    assert name in line
    assert {number: signal.getsignal(number) for number in handlers} == handlers
    assert main([f"run.dir={tmp_path}/run", *words]) == 0


def test_a_signal_in_the_last_step_lets_no_measurement_begin(words, tmp_path, capsys, monkeypatch):
    class Killer(Callback):
        def on_step_end(self, trainer, result):
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "ProgressBar", lambda console: Killer())
        assert main([f"run.dir={tmp_path}/run", *words]) == 75
    (line,) = said(capsys)
    assert "stopped by SIGTERM" in line
    assert (tmp_path / "run" / "checkpoints" / "step_00000001").is_dir()
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert main([f"run.dir={tmp_path}/run", *words]) == 0
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_a_second_interrupt_ends_a_run_at_once_with_code_1_and_a_line(words, tmp_path, capsys, monkeypatch):
    class Killer(Callback):
        def on_step_end(self, trainer, result):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("hjepa_train.signals._PATIENCE", 0.0)
    monkeypatch.setattr(run_module, "ProgressBar", lambda console: Killer())
    assert main([f"run.dir={tmp_path}/run", *words]) == 1
    (line,) = said(capsys)
    assert "interrupted; the last checkpoint stands" in line


@pytest.mark.parametrize("limit", ["0.01s", "3s"])
def test_the_time_limit_ends_measurements_as_a_signal_does(words, tmp_path, capsys, monkeypatch, limit):
    handler = signal.getsignal(signal.SIGALRM)
    command = [f"run.dir={tmp_path}/run", *words, f"data.eval={words[0].removeprefix('data.train=')}", "run.steps=1"]
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "measure", lambda *_: time.sleep(60))
        assert main([*command, "eval.at_end=true", f"run.time_limit={limit}"]) == 75
    (line,) = said(capsys)
    assert f"stopped by run.time_limit={limit}, not in training" in line
    assert "give run.time_limit more, or eval.at_end=false" in line
    assert (tmp_path / "run" / "checkpoints" / "latest").is_file()
    assert not (tmp_path / "run" / "results.json").exists()
    assert signal.getsignal(signal.SIGALRM) is handler
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert main([*command, "eval.at_end=false", "run.time_limit=1h"]) == 0
    assert (tmp_path / "run" / "results.json").is_file()
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_signal_in_a_sweep_of_learning_rates_is_an_early_stop(words, tmp_path, capsys, monkeypatch):
    class Killer(Callback):
        def on_step_end(self, trainer, result):
            if trainer.step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("hjepa_pretrain.plan.ProgressBar", lambda console: Killer())
    assert main([*words, f"plan.dir={tmp_path}", "plan.find_lr=true"]) == 75
    (line,) = said(capsys)
    assert "the sweep was stopped after step 2 of 100" in line


def test_the_time_limit_ends_a_sweep_of_learning_rates(words, tmp_path, capsys):
    assert main([*words, f"plan.dir={tmp_path}", "plan.find_lr=true", "run.time_limit=0.01s"]) == 75
    (line,) = said(capsys)
    assert "the sweep was stopped after step 1 of 100" in line
    assert list(tmp_path.iterdir()) == []


KILLED_AT_AN_IMPORT = """
import os, signal, sys
from hjepa_pretrain.cli import main
class Killer:
    def find_spec(name, path, target=None):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGTERM)
sys.meta_path.insert(0, Killer)
sys.exit(main(["--settings"]))
"""


def test_a_signal_while_the_program_loads_is_an_early_stop():
    command = [sys.executable, "-c", KILLED_AT_AN_IMPORT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 75, done.stderr
    assert "stopped by SIGTERM, not in training" in done.stderr


def test_a_demo_that_cannot_be_kept_is_one_line(tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    assert main([f"run.dir={tmp_path}/run", f"data.cache={file}"]) == 2
    (line,) = said(capsys)
    assert f"data.cache={file}: " in line


def test_a_demo_of_a_user_without_a_home_is_one_line(tmp_path, capsys, monkeypatch):
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 987_654_321)
    assert main([f"run.dir={tmp_path}/run"]) == 2
    (line,) = said(capsys)
    assert "data.cache=~/.cache/hjepa: " in line


def test_images_that_find_themselves_are_named(words, tmp_path, caplog):
    same = words[0].removeprefix("data.train=")
    assert main([f"run.dir={tmp_path}/run", *words, f"data.eval={same}"]) == 0
    assert f"data.eval={same}: images of data.train find themselves" in caplog.text
    assert "data.eval: not given" not in caplog.text


def test_a_run_whose_features_are_not_finite_has_diverged(words, tmp_path, capsys):
    endless = ("trainer.learning_rate.value=1e30", "trainer.learning_rate.warmup_steps=0", "trainer.guard.max_skips=99")
    same = words[0].removeprefix("data.train=")
    assert main([f"run.dir={tmp_path}/run", *words, f"data.eval={same}", "eval.at_end=true", *endless]) == 3
    (line,) = said(capsys)
    assert "not finite: the model has diverged" in line


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, 2), (errno.EROFS, 2), (errno.EIO, 1)])
def test_a_full_disk_is_for_the_user_to_mend(number, code):
    failure = judge(OSError(number, os.strerror(number), "model.safetensors"))
    assert failure.code == code
    assert "model.safetensors" in failure.line


def test_a_disk_that_fills_when_the_weights_are_written_is_one_line(words, tmp_path, capsys, monkeypatch):
    def save_on_a_full_disk(model, folder):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            save_model(model, folder)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "save_model", save_on_a_full_disk)
        assert main([f"run.dir={tmp_path}/run", *words]) == 2
    (line,) = said(capsys)
    assert os.strerror(errno.EFBIG) in line
    assert "make room" in line
    assert main([f"run.dir={tmp_path}/run", *words]) == 0
