"""What befalls a run of two ranks under torchrun changes no bit of it."""

import os
import signal

import pytest

LAUNCH = ("--max-restarts=1", "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
STEPS = 30


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(1800)  # torchrun is started four times, each process of which imports torch
def test_signals_and_a_killed_worker_change_no_bit(pretrain, tiny, workers_of, tmp_path, read_losses):
    words = (*tiny, f"run.steps={STEPS}", "checkpoint.every_steps=5", "parallel=ddp", "eval.at_end=false")
    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    done = pretrain(f"run.dir={whole}", *words, ranks=2)
    assert done.code == 0, done.err
    for number, rows in ((signal.SIGTERM, 3), (signal.SIGUSR1, 9)):
        # torchrun alone gets the signal, hands it on, waits for what it has started, and starts nothing again.
        stopped = pretrain.disturb(
            lambda process, number=number: process.send_signal(number),
            run_dir, rows, *words, ranks=2, torchrun=LAUNCH, release=False,
        )  # fmt: skip
        assert stopped.code == 1, stopped.err
        assert "stopped early, everything is saved" in stopped.err
        reached = read_losses(run_dir)[-1][0]
        assert rows <= reached < STEPS
        assert (run_dir / "checkpoints" / f"step_{reached:08d}").is_dir()
    killed = pretrain.disturb(
        lambda process: os.kill(workers_of(process)[-1], signal.SIGKILL),
        run_dir, reached + 6, *words, ranks=2, torchrun=LAUNCH,
    )  # fmt: skip
    assert killed.code == 0, killed.err
    assert "exitcode: -9" in killed.err
    assert killed.err.count("resumed at step") == 2, killed.err
    assert read_losses(run_dir) == read_losses(whole)
    assert [step for step, _ in read_losses(whole)] == list(range(1, STEPS + 1))
    assert (run_dir / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
