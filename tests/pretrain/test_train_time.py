"""A run as long as it has time for: its steps are measured once, and it is then the run of so many steps."""

import re
import time

import pytest
import torch
import yaml

from hjepa_pretrain import run, settings, train_time
from hjepa_pretrain.task import build_task
from hjepa_train import StepTime

# Dropped paths draw from the global generator: what measuring has drawn would show.
OWN = ("recipe=hjepa_global", "hjepa.predict_every=4", "hjepa.encoder.drop_path=0.5", "eval.at_end=false")


@pytest.fixture
def words(tiny):
    return (*(word for word in tiny if not word.startswith(("run.steps", "trainer.learning_rate.warmup"))), *OWN)


@pytest.fixture
def measured(monkeypatch):
    """Let a step take 0.25 s, and count how often it is measured."""
    calls = []
    monkeypatch.setattr(run, "measure_step", lambda *_: calls.append(1) or StepTime(seconds=0.25, steps=8))
    return calls


def stored(folder):
    return yaml.safe_load((folder / "config.yaml").read_text())


@pytest.mark.slow
def test_a_run_takes_its_time_and_is_that_of_as_many_steps(pretrain, words, tmp_path, capsys, monkeypatch, read_rows):
    # What this process computes: others may come and go meanwhile.
    monkeypatch.setattr(time, "perf_counter", time.thread_time)
    timed, counted = tmp_path / "timed", tmp_path / "counted"
    done = pretrain.here(capsys, f"run.dir={timed}", *words, "run.train_time=4s")
    assert done.code == 0, done.err
    steps, each, over = re.search(
        r"run\.train_time=4s: ([\d,]+) steps \(([\d.,]+) ms each, measured over (\d+)\)", done.out
    ).groups()
    steps = int(steps.replace(",", ""))
    assert steps == pytest.approx(4000 / float(each.replace(",", "")), rel=0.02, abs=1)
    assert int(over) % 4 == 0  # whole cycles of hjepa.predict_every
    rows = [row for row in read_rows(timed) if "train/step_ms" in row]
    assert rows[-1]["step"] == len(rows) == steps
    assert 4 / 3 < sum(row["train/step_ms"] for row in rows) / 1e3 < 4 * 3

    assert pretrain.here(capsys, f"run.dir={counted}", *words, f"run.steps={steps}").code == 0
    assert (timed / "model.safetensors").read_bytes() == (counted / "model.safetensors").read_bytes()
    ours, theirs = stored(timed), stored(counted)
    assert (ours["run"].pop("train_time"), theirs["run"].pop("train_time")) == ("4s", None)
    for one in (ours, theirs):
        del one["provenance"], one["run"]["dir"]
    assert ours == theirs


def test_steps_are_measured_once(pretrain, words, tmp_path, capsys, measured, read_losses):
    folder = tmp_path / "run"
    command = (f"run.dir={folder}", *words, "run.train_time=1s")
    assert pretrain.here(capsys, *command).code == 0
    assert [step for step, _ in read_losses(folder)] == [1, 2, 3, 4]
    for again in (command, (f"run.dir={folder}",)):
        done = pretrain.here(capsys, *again)
        assert done.code == 0, done.err
        assert stored(folder)["run"]["steps"] == 4
    done = pretrain.here(capsys, f"run.dir={folder}", "run.train_time=2s")
    assert done.code == 2
    assert "run.train_time=2s: the run in" in done.message
    assert "run.steps=4; change that" in done.message
    # A length of its own is no longer that of the time.
    assert pretrain.here(capsys, f"run.dir={folder}", "run.steps=5").code == 0
    assert [step for step, _ in read_losses(folder)] == [1, 2, 3, 4, 5]
    assert stored(folder)["run"]["train_time"] is None
    assert len(measured) == 1


def test_what_follows_from_the_steps_is_said_once_they_are_known(pretrain, words, tmp_path, capsys, measured, caplog):
    with caplog.at_level("INFO"):
        pretrain.here(capsys, f"run.dir={tmp_path}/run", *words, "run.train_time=1s", "profiler.active=4")
    said = [record.getMessage() for record in caplog.records]
    assert [line for line in said if "shortened" in line] == [
        "trainer.learning_rate.warmup_steps=1000 shortened to 0, a fifth of run.steps=4"
    ]
    assert len([line for line in said if "nothing reads profiler.active" in line]) == 1


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (["run.train_time=0.2s"], 2, "run.train_time=0.2s: no time for a step, which takes 250.0 ms; give more"),
        (["run.train_time=1s", "run.steps=4"], 2, "run.train_time=1s: measures how many steps there are"),
        (["run.train_time=an hour"], 2, "run.train_time=an hour: no length of time"),
        (["run.train_time=1s", "hjepa.predict_every=0"], 2, "predict_every=0"),
    ],
)
def test_a_time_that_is_none_is_refused(pretrain, words, tmp_path, capsys, measured, more, code, said):
    done = pretrain.here(capsys, f"run.dir={tmp_path}/run", *words, *more)
    assert done.code == code
    assert said in done.message
    assert len(done.err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_the_time_limit_bounds_the_timing_of_steps(pretrain, words, tmp_path, capsys):
    done = pretrain.here(capsys, f"run.dir={tmp_path}/run", *words, "run.train_time=1h", "run.time_limit=0.01s")
    assert done.code == 75, done.err
    assert "stopped while steps were timed" in done.message
    assert not (tmp_path / "run").exists()


def test_a_signal_while_steps_are_timed_leaves_nothing(pretrain, words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_time, "time_steps", lambda *_, **__: None)
    done = pretrain.here(capsys, f"run.dir={tmp_path}/run", *words, "run.train_time=1s")
    assert done.code == 75
    assert "stopped while steps were timed" in done.message
    assert not (tmp_path / "run").exists()


def test_the_schedules_are_those_of_the_steps_that_fit(pretrain, words, tmp_path, capsys, measured):
    plan = ("plan.show=true", f"plan.dir={tmp_path}/plan")
    timed = pretrain.here(capsys, *words, *plan, "run.train_time=25s")
    counted = pretrain.here(capsys, *words, *plan, "run.steps=100")
    assert timed.code == 0, timed.err
    assert timed.out == "run.train_time=25s: 100 steps (250.0 ms each, measured over 8)\n" + counted.out


def test_settings_say_that_the_steps_are_not_known_yet(pretrain, words, tmp_path, capsys, measured):
    folder = f"run.dir={tmp_path}/run"
    said = "how many steps fit is measured when the run begins"
    assert said in pretrain.here(capsys, "--settings", folder, *words, "run.train_time=1s").err
    assert pretrain.here(capsys, folder, *words, "run.train_time=1s").code == 0
    assert said not in pretrain.here(capsys, "--settings", folder, *words, "run.train_time=1s").err


@pytest.mark.slow
def test_processes_that_torchrun_starts_again_do_not_measure_again(
    pretrain, words, tmp_path, capsys, monkeypatch, measured, read_losses
):
    agent = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(agent.port), "RANK": "0", "WORLD_SIZE": "1"}
    monkeypatch.chdir(tmp_path)
    for life in range(2):
        environment = {**place, "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": str(life)}
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("hjepa_pretrain.run.time.time", lambda life=life: 1.8e9 + 60 * life)
        done = pretrain.here(capsys, *words, "run.train_time=1s")
        assert done.code == 0, done.err
    (folder,) = (tmp_path / "runs").iterdir()
    assert len(read_losses(folder)) == 4
    assert len(measured) == 1


@pytest.mark.slow
def test_ranks_agree_on_the_steps(pretrain, words, tmp_path, read_losses):
    done = pretrain(f"run.dir={tmp_path}/run", *words, "run.train_time=3s", "data.workers=1", ranks=2)
    assert done.code == 0, done.err
    steps = stored(tmp_path / "run")["run"]["steps"]
    assert done.out.count("run.train_time=3s: ") == 1
    assert read_losses(tmp_path / "run")[-1][0] == steps


def test_the_cycle_of_a_task_is_that_of_its_predictions():
    for words, cycle in ((["recipe=hjepa_global", "hjepa.predict_every=3"], 3), (["recipe=simclr"], 1)):
        assert build_task(settings.load(words, quiet=True)[0]).cycle == cycle


@pytest.mark.parametrize(
    ("more", "shares"),
    [
        (["recipe=hjepa_global"], [1.0]),
        (["recipe=simclr"], [1.0]),
        (["recipe=hjepa", "hjepa.level_weights.kind=curriculum"], [1 / 6, 1 / 6, 2 / 3]),
        (["recipe=hjepa", "hjepa.encoder.processing_patch_size=[8,8]", "hjepa.encoder.output_patch_size=[4,4]",
          "hjepa.targets=projection", "hjepa.patch_schedule={sizes: [8, 4], boundaries: [0.25]}"], [0.25, 0.75]),
    ],
    ids=["one graph", "baseline", "curriculum", "patches"],
)  # fmt: skip
def test_a_run_is_timed_where_its_cost_changes(more, shares):
    config, _ = settings.load([*more, "run.train_time=1s"], steps=train_time.LONG)
    found = train_time.places(build_task(config))
    assert list(found.values()) == pytest.approx(shares, abs=2e-3)
    # From the start of each, so that no cycle is of two.
    begins = [sum(shares[:number]) * train_time.LONG for number in range(len(shares))]
    assert list(found) == pytest.approx(begins, abs=2e-3 * train_time.LONG)
