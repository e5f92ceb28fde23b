"""A run that was killed goes on as if nothing had happened."""

import os
import shlex
import shutil
import signal

import pytest

from hjepa_pretrain.demo import compose_demo
from hjepa_pretrain.demo.shards import write_demo_shards


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_is_killed_three_times_has_the_losses_of_an_undisturbed_one(
    pretrain, workers, tmp_path, tiny, read_losses
):
    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    words = (*tiny, "checkpoint.every_steps=1", "run.steps=12", "eval.at_end=false", f"data.workers={workers}")
    for rows in (1, 4, 9):
        pretrain.kill_after(run_dir, rows, *words)
        assert rows <= len(read_losses(run_dir)) < 12
    for folder, told in ((run_dir, ()), (whole, words)):
        done = pretrain(f"run.dir={folder}", *told)
        assert done.code == 0, done.err
    assert read_losses(run_dir) == read_losses(whole)
    assert (run_dir / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_time_limit_preempts_and_the_run_goes_on(pretrain, tmp_path, tiny, read_losses):
    run_dir = tmp_path / "run"
    stopped = pretrain(f"run.dir={run_dir}", *tiny, "run.steps=200000", "run.time_limit=1s", "eval.at_end=false")
    assert stopped.code == 75, stopped.err
    reached = read_losses(run_dir)[-1][0]
    assert f"run.dir={run_dir}" in stopped.out + stopped.err
    again = pretrain(f"run.dir={run_dir}", f"run.steps={reached + 3}", "run.time_limit=null")
    assert again.code == 0, again.err
    assert [step for step, _ in read_losses(run_dir)] == list(range(1, reached + 4))


def test_a_process_that_gets_sigterm_ends_with_75_and_its_own_advice_goes_on(pretrain, tmp_path, tiny, read_losses):
    run_dir = tmp_path / "run of mine"
    words = (*tiny, "checkpoint.every_steps=null", "checkpoint.every_minutes=null", "eval.at_end=false")
    words = (*words, "run.steps=100000")
    stopped = pretrain.disturb(lambda process: process.send_signal(signal.SIGTERM), run_dir, 3, *words)
    assert stopped.code == 75, stopped.err
    reached = read_losses(run_dir)[-1][0]
    program, *advice = shlex.split(stopped.message.partition("go on with: ")[2])
    assert program == "hjepa-pretrain"
    again = pretrain(*advice, f"run.steps={reached + 2}")
    assert again.code == 0, again.err
    assert f"resumed at step {reached} of {reached + 2}" in again.err
    assert [step for step, _ in read_losses(run_dir)] == list(range(1, reached + 3))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_to_the_whole_group_leaves_workers_alone(pretrain, tmp_path, tiny, read_losses, name, capsys):
    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    words = (*tiny, "checkpoint.every_steps=null", "checkpoint.every_minutes=null", "eval.at_end=false")
    words = (*words, "data.workers=1", "trainer.accumulate=4", "run.steps=40")
    number = getattr(signal, name)
    stopped = pretrain.disturb(lambda process: os.killpg(process.pid, number), run_dir, 3, *words)
    assert stopped.code == 75, stopped.err
    reached = read_losses(run_dir)[-1][0]
    assert (run_dir / "checkpoints" / f"step_{reached:08d}").is_dir()
    assert reached < 40
    for folder in (run_dir, whole):
        done = pretrain.here(capsys, f"run.dir={folder}", *words)
        assert done.code == 0, done.err
    assert read_losses(run_dir) == read_losses(whole)
    assert (run_dir / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_shards_may_move_and_others_are_refused(pretrain, shards, tmp_path, tiny, capsys, read_losses):
    run_dir, moved = tmp_path / "run", shutil.copytree(shards, tmp_path / "moved")
    words = (f"run.dir={run_dir}", "eval.at_end=false")
    assert pretrain.here(capsys, *words, *tiny, "run.steps=2").code == 0
    again = pretrain.here(capsys, *words, f"data.train={moved}/train-*.tar", "run.steps=3")
    assert again.code == 0, again.err
    assert [step for step, _ in read_losses(run_dir)] == [1, 2, 3]
    before = (run_dir / "config.yaml").read_text()
    assert f"train: {moved}" in before
    write_demo_shards(compose_demo("train", 300, seed=8), tmp_path / "other", "train", samples_per_shard=60)
    others = pretrain.here(capsys, *words, f"data.train={tmp_path}/other/train-*.tar", "run.steps=4")
    assert others.code == 2
    assert "had other samples than these 300" in others.message
    assert (run_dir / "config.yaml").read_text() == before


def test_a_finished_run_is_not_run_again(pretrain, tmp_path, tiny, capsys, read_losses):
    run_dir = tmp_path / "run"
    assert pretrain.here(capsys, f"run.dir={run_dir}", *tiny, "run.steps=2", "eval.at_end=false").code == 0
    before = read_losses(run_dir)
    again = pretrain.here(capsys, f"run.dir={run_dir}")
    assert again.code == 0
    assert read_losses(run_dir) == before
