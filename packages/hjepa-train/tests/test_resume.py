"""A run that was stopped and started again is the run that was not."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hjepa_train import (
    Callback,
    CheckpointConfig,
    CheckpointError,
    CollapseMonitor,
    MetricsLog,
    MonitorConfig,
    OptimizerConfig,
    Outcome,
    ParallelConfig,
    ScheduleConfig,
    TimeLimit,
    Trainer,
    TrainerConfig,
)
from hjepa_train.signals import StopSignals
from hjepa_train.testing import ArithmeticStream, ToyModule

STEPS = 12
SCRIPTS = Path(__file__).parent / "scripts"


class StopAt(Callback):
    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, trainer, result):
        if trainer.step == self.step:
            self.action(trainer)


def build(device, run_dir, *, extra=(), module=None, seed=0, **fields):
    settings = {
        "steps": STEPS,
        "log_every": 1,
        "parallel": ParallelConfig(device=device.type),
        "learning_rate": ScheduleConfig(kind="cosine", value=0.02, final=0.0, warmup_steps=3),
    }
    torch.manual_seed(seed)
    return Trainer(
        ToyModule(dropout=0.2, late_step=4) if module is None else module,
        ArithmeticStream(),
        TrainerConfig(**(settings | fields)),
        run_dir=run_dir,
        callbacks=[MetricsLog(run_dir / "metrics.jsonl"), CollapseMonitor(MonitorConfig(every=2)), *extra],
        checkpoint=CheckpointConfig(every_steps=3, every_minutes=None),
    )


def losses(run_dir):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["train/loss"], row["train/grad_norm"]) for row in rows]


@pytest.fixture
def reference(device, tmp_path):
    folder = tmp_path / "reference"
    trainer = build(device, folder)
    assert trainer.fit() is Outcome.DONE
    return trainer, losses(folder)


def assert_equal_runs(trainer, reference_trainer, device):
    for name, value in reference_trainer.module.state_dict().items():
        mine = trainer.module.state_dict()[name]
        assert torch.equal(mine, value) if device.type == "cpu" else torch.allclose(mine, value, atol=1e-5), name


@pytest.mark.parametrize("stop", range(1, STEPS))
def test_a_run_stopped_at_any_step_goes_on_bit_by_bit(stop, device, reference, tmp_path):
    expected_trainer, expected = reference
    run_dir = tmp_path / "run"
    stopper = StopAt(stop, lambda trainer: trainer.request_stop("a test"))
    assert build(device, run_dir, extra=[stopper]).fit() is Outcome.PREEMPTED
    trainer = build(device, run_dir, seed=stop)
    assert trainer.fit() is Outcome.DONE
    if device.type == "cpu":
        assert losses(run_dir) == expected
    assert_equal_runs(trainer, expected_trainer, device)


@pytest.mark.parametrize("stop", [2, 5, 11])
def test_an_error_goes_back_to_the_last_checkpoint_and_repeats_the_rows(stop, device, reference, tmp_path):
    run_dir = tmp_path / "run"

    def fail(trainer):
        raise RuntimeError("power cut")

    class LateFailure(Callback):
        def on_row(self, trainer, row):
            if trainer.step == stop:
                fail(trainer)

    with pytest.raises(RuntimeError, match="power cut"):
        build(device, run_dir, extra=[LateFailure()]).fit()
    assert losses(run_dir)[-1][0] == stop
    trainer = build(device, run_dir, seed=stop if stop > 3 else 0)
    assert trainer.fit() is Outcome.DONE
    assert [step for step, *_ in losses(run_dir)] == list(range(1, STEPS + 1))
    assert_equal_runs(trainer, reference[0], device)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_finishes_the_step_saves_and_says_preempted(name, device, tmp_path):
    stopper = StopAt(4, lambda trainer: os.kill(os.getpid(), getattr(signal, name)))
    before = signal.getsignal(getattr(signal, name))
    trainer = build(device, tmp_path, extra=[stopper])
    outcome = trainer.fit()
    assert outcome is Outcome.PREEMPTED
    assert outcome.exit_code == 75
    assert trainer.stop_reason == name
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_00000004\n"
    assert signal.getsignal(getattr(signal, name)) is before


def test_a_second_interrupt_is_at_once(device, tmp_path, monkeypatch):
    monkeypatch.setattr("hjepa_train.signals._PATIENCE", 0.0)

    def interrupt_twice(trainer):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        build(device, tmp_path, extra=[StopAt(2, interrupt_twice)]).fit()
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_leaves_ctrl_c_and_sigusr1_to_the_run_and_obeys_sigterm():
    with StopSignals(lambda name: pytest.fail(f"{name} of a worker stopped the run")):
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGTERM


def test_an_interrupt_that_torchrun_repeats_is_one(device, tmp_path, monkeypatch):
    monkeypatch.setattr("hjepa_train.signals._PATIENCE", 600.0)

    def interrupt_twice(trainer):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    assert build(device, tmp_path, extra=[StopAt(2, interrupt_twice)]).fit() is Outcome.PREEMPTED


def test_the_time_limit_preempts(device, tmp_path):
    trainer = build(device, tmp_path, extra=[TimeLimit(1e-9)])
    assert trainer.fit() is Outcome.PREEMPTED
    assert trainer.step == 1
    assert "time limit of 0:00" in trainer.stop_reason
    with pytest.raises(ValueError, match="minutes=0"):
        TimeLimit(0)


def test_a_stop_at_the_last_step_is_done(device, tmp_path):
    trainer = build(device, tmp_path, extra=[StopAt(STEPS, lambda trainer: trainer.request_stop("too late"))])
    assert trainer.fit() is Outcome.DONE


def test_saves_by_the_clock(device, tmp_path, monkeypatch):
    """A step takes 25 s by this clock: a minute has passed after three of them, and again after the next three."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    class Slow(Callback):
        def on_step_end(self, trainer, result):
            now[0] += 25.0

    cadence = CheckpointConfig(every_steps=None, every_minutes=1.0, keep=None)
    config = TrainerConfig(steps=8, parallel=ParallelConfig(device=device.type))
    trainer = Trainer(ToyModule(), ArithmeticStream(), config, run_dir=tmp_path, callbacks=[Slow()], checkpoint=cadence)
    trainer.fit()
    assert [path.name[-1:] for path in trainer.store.paths()] == ["8", "6", "3"]


def test_a_loader_that_draws_a_seed_when_it_starts_changes_nothing(device, tmp_path):
    class Seeding(ArithmeticStream):
        def __iter__(self):
            torch.randint(1000, ())  # what a DataLoader with workers does
            return super().__iter__()

    runs = []
    for name, stops in (("whole", [None]), ("parts", [2, 5, None])):
        for stop in stops:
            extra = [] if stop is None else [StopAt(stop, lambda trainer: trainer.request_stop("a test"))]
            first = stop == 2 or name == "whole"
            trainer = build(device, tmp_path / name, extra=extra, seed=0 if first else 1)
            trainer.stream = Seeding()
            trainer.fit()
        runs.append(trainer)
    assert_equal_runs(runs[1], runs[0], device)


def test_nothing_that_came_from_a_file_is_unpickled(device, tmp_path, monkeypatch):
    build(device, tmp_path).fit()

    def refuse(*_args, **_kwargs):
        raise AssertionError("a checkpoint was unpickled")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    trainer = build(device, tmp_path, steps=STEPS + 1)
    assert trainer.fit() is Outcome.DONE
    files = [path for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()]
    assert {path.name for path in files} == {"latest", "manifest.json", "state.json", "rank_00000.safetensors"}


def test_a_checkpoint_of_another_model_is_refused_in_one_line(device, tmp_path):
    build(device, tmp_path, module=ToyModule(width=8)).fit()
    with pytest.raises(CheckpointError, match=r"another model: \d+ of another shape") as caught:
        build(device, tmp_path, module=ToyModule(width=12)).fit()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("before", "after"), [("adamw", "muon"), ("muon", "adamw"), ("adamw", "lars")])
def test_a_checkpoint_of_another_optimizer_is_refused_in_one_line(device, tmp_path, before, after):
    kinds = {kind: OptimizerConfig(kind=kind, muon_names=("online.",)) for kind in (before, after)}
    build(device, tmp_path, steps=2, optimizer=kinds[before]).fit()
    said = rf"optimizer.kind={after}: .*step_00000002 has the state of {before}; allowed: {before}; "
    with pytest.raises(CheckpointError, match=said) as caught:
        build(device, tmp_path, steps=3, optimizer=kinds[after]).fit()
    assert "\n" not in str(caught.value)


def test_a_checkpoint_that_names_no_optimizer_is_gone_on_with(device, tmp_path, monkeypatch):
    state = Trainer._state
    with monkeypatch.context() as earlier:
        earlier.setattr(Trainer, "_state", lambda self: {k: v for k, v in state(self).items() if k != "optimizer"})
        build(device, tmp_path, steps=2).fit()
    assert build(device, tmp_path, steps=3).fit() is Outcome.DONE


@pytest.mark.slow
def test_kill_9_at_any_moment_leaves_a_run_that_resumes_bit_by_bit(tmp_path):
    """One process forks a training per moment: at steps, inside each stage of a save, and at random times."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPTS / "kill.py"), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert len(report["killed"]) >= 12
    assert report["survived"] == []
    assert report["different"] == []
