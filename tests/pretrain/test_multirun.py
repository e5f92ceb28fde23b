"""Several runs from one command: here, and as Slurm jobs whose generated scripts are really run."""

import os
import socket
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml

HELD = Path(__file__).parent / "scripts" / "held.py"
# Stand-ins for Slurm's commands: `sbatch` runs a copy of the script, again where `scontrol` has asked for it; `srun`
# starts its tasks, and sends the first ones, which wait for it, their signal where a test wants it; `sacct` says how
# the job is.
SBATCH = """\
#!/bin/bash
script="$FAKE_SLURM/job.sh"
cp "${@: -1}" "$script"
export SLURM_JOB_ID=77 SLURM_JOB_NODELIST=localhost SLURM_NNODES=1 SLURM_JOB_NUM_NODES=1 SLURM_NODEID=0
export SLURM_NTASKS=$(grep -oP '(?<=--ntasks-per-node=)\\d+' "$script")
again="$FAKE_SLURM/again"
(while :; do bash "$script"; code=$?; [ -e "$again" ] && rm "$again" || break; done; echo $code >"$FAKE_SLURM/code") \\
    >"$FAKE_SLURM/out" 2>&1 &
echo "Submitted batch job 77"
"""
SRUN = """\
#!/bin/bash
while [[ "$1" == -* ]]; do case "$1" in --output|--error) shift 2;; *) shift;; esac; done
python="$1"
while [ "$1" != -m ]; do shift; done
for rank in $(seq 0 $((SLURM_NTASKS - 1))); do
    SLURM_PROCID=$rank SLURM_LOCALID=$rank "$python" -u "$HELD" "$@" & tasks+=" $!"
done
if [ -e "$FAKE_SLURM/signal" ]; then
    until [ -s "$FAKE_SLURM/sweep/0/metrics.jsonl" ]; do kill -0 $tasks || break; sleep 0.1; done
    kill -USR1 $tasks
    rm "$FAKE_SLURM/signal"
fi
for task in $tasks; do wait $task || code=$?; done
exit $code
"""
SACCT = """\
#!/bin/bash
state=RUNNING
[ -s "$FAKE_SLURM/code" ] && { [ "$(cat "$FAKE_SLURM/code")" = 0 ] && state=COMPLETED || state=FAILED; }
echo "JobID|State|NodeList"; echo "77|$state|localhost"; echo "77_0|$state|localhost"
"""
SCONTROL = """\
#!/bin/bash
echo "$@" >>"$FAKE_SLURM/scontrol"
[ -e "$FAKE_SLURM/full" ] && exit 1
touch "$FAKE_SLURM/again"
"""


def run(*words, env=None, timeout=600):
    return subprocess.run(
        [sys.executable, "-m", "hjepa_pretrain", "--multirun", *words],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        check=False,
    )


@pytest.mark.slow
def test_every_combination_runs_in_its_folder(tiny, tmp_path):
    words = ("eval.at_end=false", "run.steps=1,2", "recipe=hjepa", f"hydra.sweep.dir={tmp_path}/sweep")
    finished = run(*[word for word in tiny if not word.startswith("run.steps")], *words)
    assert finished.returncode == 0, finished.stderr
    steps = [yaml.safe_load((tmp_path / "sweep" / n / "config.yaml").read_text())["run"]["steps"] for n in "01"]
    assert steps == [1, 2]


@pytest.mark.slow
def test_every_combination_measures_its_own_steps(tiny, tmp_path):
    words = ("eval.at_end=false", "run.train_time=4s", "recipe=hjepa,simclr", "data.views=2")
    finished = run(
        *[word for word in tiny if not word.startswith("run.steps")], *words, f"hydra.sweep.dir={tmp_path}/sweep"
    )
    assert finished.returncode == 0, finished.stderr
    said = [line for line in finished.stdout.splitlines() if line.startswith("run.train_time=4s: ")]
    steps = [yaml.safe_load((tmp_path / "sweep" / n / "config.yaml").read_text())["run"]["steps"] for n in "01"]
    assert [f"{one:,} steps" in line for one, line in zip(steps, said, strict=True)] == [True, True]


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("sacct", SACCT), ("scontrol", SCONTROL)):
        path = folder / name
        path.write_text(textwrap.dedent(text))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    with socket.socket() as taken:
        # Bound and not listening: nobody else is given the port, and who sets this flag may listen on it.
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("", 0))
        port = str(taken.getsockname()[1])
        held = {"HELD": str(HELD), "HOLD_FILE": str(tmp_path / "signal"), "HOLD_STEP": "1"}
        yield {"PATH": f"{folder}:{os.environ['PATH']}", "FAKE_SLURM": str(tmp_path), "MASTER_PORT": port, **held}


JOB = (
    "eval.at_end=false",
    "recipe=hjepa",
    "hydra/launcher=submitit_slurm",
    "hydra.launcher.tasks_per_node=2",
    "hydra.launcher.partition=gpu",
    "hydra.launcher.timeout_min=600",
    "hydra.launcher.signal_delay_s=120",
)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_slurm_job_is_one_run_of_all_its_tasks_and_awaited_in_its_next_life(tiny, tmp_path, slurm):
    (tmp_path / "signal").touch()
    words = ("run.steps=20", f"hydra.sweep.dir={tmp_path}/sweep")
    finished = run(*[word for word in tiny if not word.startswith("run.steps")], *JOB, *words, env=slurm)
    assert finished.returncode == 0, finished.stderr
    script, said = (tmp_path / "job.sh").read_text(), (tmp_path / "out").read_text()
    for line in ("--ntasks-per-node=2", "--partition=gpu", "--time=600", "--signal=USR1@120"):
        assert f"#SBATCH {line}" in script, script
    stored = yaml.safe_load((tmp_path / "sweep" / "0" / "config.yaml").read_text())
    assert stored["parallel"] == "ddp"
    assert len(stored["provenance"]) == 2, said
    assert (tmp_path / "sweep" / "0" / "checkpoints" / "step_00000020").is_dir(), said
    assert (tmp_path / "scontrol").read_text().split() == ["requeue", "77"], said


@pytest.mark.slow
def test_a_slurm_job_that_stopped_and_is_not_queued_again_has_not_ended_well(tiny, tmp_path, slurm):
    (tmp_path / "full").touch()
    same = [word for word in JOB if "tasks_per_node" not in word]
    words = (*same, "run.steps=100000", "run.time_limit=1s", f"hydra.sweep.dir={tmp_path}/sweep")
    stopped = run(*[word for word in tiny if not word.startswith("run.steps")], *words, env=slurm)
    assert stopped.returncode == 1, stopped.stderr
    assert (tmp_path / "code").read_text() == "75\n"
    (line,) = stopped.stderr.splitlines()
    assert "Job 77" in line
    assert "Slurm did not queue job 77 again" in (tmp_path / "out").read_text()
    assert (tmp_path / "sweep" / "0" / "checkpoints" / "latest").exists()


@pytest.mark.slow
def test_a_slurm_job_has_the_exit_code_of_its_run(tiny, tmp_path, slurm):
    same = [word for word in JOB if "tasks_per_node" not in word]
    words = (*same, f"data.eval={tmp_path}/none.tar", f"hydra.sweep.dir={tmp_path}/sweep")
    failed = run(*[word for word in tiny if not word.startswith("data.eval")], *words, env=slurm)
    assert (tmp_path / "code").read_text() == "2\n", failed.stderr
    assert failed.returncode == 1, failed.stderr
    assert not (tmp_path / "scontrol").exists()
    (line,) = failed.stderr.splitlines()
    assert "Job 77" in line
    assert "state: FAILED" in line
    assert f"{tmp_path}/none.tar" in (tmp_path / "out").read_text()
