"""What ends one of several runs, and what ends them all."""

import sys

import pytest

from hjepa_pretrain import cli
from hjepa_pretrain.multirun import _queue_again, multirun


@pytest.mark.parametrize(
    ("limit", "runs"),
    [
        ("", 1),
        ("run.time_limit=null", 1),
        ("run.time_limit=1h", 1),
        ("run.time_limit=1h,2h", 1),
        ("run.time_limit=0.000001s", 2),
    ],
)
def test_the_time_limit_ends_one_run_and_a_signal_all(tmp_path, monkeypatch, capsys, limit, runs):
    begun = []

    def stopped(words):
        begun.append(words)
        return 75

    monkeypatch.setattr(cli, "main", stopped)
    monkeypatch.setattr(sys, "argv", ["hjepa-pretrain"])
    for name in ("HYDRA_FULL_ERROR", "SUBMITIT_PREEMPT_SIGNAL"):
        monkeypatch.setenv(name, "1")
    words = ["run.seed=0,1", *filter(None, [limit]), f"hydra.sweep.dir={tmp_path}/sweep"]
    try:
        code = multirun(words)
    except SystemExit as end:
        code = end.code
    assert code == 75
    assert len(begun) == runs
    assert ("the runs after it" in capsys.readouterr().err) is (runs == 1)


def test_a_job_whose_machine_has_no_scontrol_says_that_it_is_not_queued(monkeypatch, caplog):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    monkeypatch.setenv("PATH", "")
    _queue_again()
    assert "Slurm did not queue job 77 again" in caplog.text
    assert "scontrol" in caplog.text
