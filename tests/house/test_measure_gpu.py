"""The commands that measure a GPU are words that the programs take, and their numbers are found."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import measure_gpu
from hjepa_pretrain import settings
from workspace import ROOT

TINY = ("preset=demo", "recipe=ijepa", "data.batch_size=4", "run.threads=1")


def one(row: measure_gpu.Row, seconds: float = 300) -> dict[str, Any]:
    ((measured, found),) = measure_gpu.measure([row], "", each=seconds)
    assert measured is row
    assert found is not None
    return found


@pytest.mark.parametrize("row", measure_gpu.ROWS, ids=range(len(measure_gpu.ROWS)))
def test_every_row_can_be_run(row: measure_gpu.Row, tmp_path: Path) -> None:
    places = {"photos": "photos/*.tar", "noise": "noise.tar", "run": str(tmp_path / "run"), "json": "row.json"}
    words = [measure_gpu._fill(word, places) for word in row.words]
    if row.program.startswith("tools/"):
        assert (ROOT / row.program).exists()
    elif "loader" not in words:
        # As throughput does where a model is named and no data.
        config, _ = settings.load(["data.train=synthetic", *(word for word in words if "=" in word)])
        assert config.model.startswith("vit_")


def test_a_run_until_its_first_step_has_images() -> None:
    start = next(row for row in measure_gpu.ROWS if row.cold)
    small = ("depth=1", "embed_dim=64", "num_heads=2")
    sizes = [f"hjepa.{part}.{size}" for part in ("encoder", "predictor") for size in small]
    more = (*sizes, "data.batch_size=4", "trainer.compile=false", "run.threads=1")
    found = one(replace(start, words=(*start.words, *more)))
    assert found["exit"] == 0, found["printed"]
    assert found["images_per_second"] > 0


def test_numbers_of_a_step_and_of_a_run_are_found() -> None:
    step = measure_gpu._step(*TINY, reach="soon", options=("--no-parts", "--reference"))
    found = one(step)
    assert found["exit"] == 0, found["printed"]
    assert found["images_per_second"] > 0
    assert found["reference"]["speedup"] > 0
    assert found["parts"] == {}
    run = one(measure_gpu._run(*TINY, *measure_gpu._QUIET, "run.steps=2"))
    assert run["exit"] == 0, run["printed"]
    lines = measure_gpu.table([found, run]).splitlines()
    assert f"| soon | {found['images_per_second']:,.0f} | {found['milliseconds']:.1f} |  |" in lines[2]
    assert f"|  | {run['images_per_second']:,.0f} |  |  |" in lines[3]


@pytest.mark.parametrize("workers", [0, 1])
def test_what_takes_too_long_is_ended_with_its_workers(workers: int) -> None:
    long = measure_gpu._run(*TINY, *measure_gpu._QUIET, "run.steps=100000", f"data.workers={workers}")
    began = time.monotonic()
    found = one(long, 8)
    assert found["exit"] != 0
    assert "most recent call first" in found["printed"]
    assert 8 <= time.monotonic() - began < 60
    assert measure_gpu.table([found]).endswith(f"exit {found['exit']} |")


STEP = """
import sys, time
from pathlib import Path
from hjepa_benchmark.throughput.measure import _in_its_turn

name, log, turn = sys.argv[2], Path(sys.argv[3]), Path(sys.argv[5])

def work(doing, times=1, until=()):
    while times > 0 or not all(line in log.read_text() for line in until):
        times -= 1
        with log.open("a") as file:
            file.write(f"{time.monotonic()} {name} {doing}\\n")
        time.sleep(0.01)

others = [f"{other} compiles" for other in ("second", "third")]
work("compiles", until=others if name == "first" else ["first is timed"])
work("compiles", times=1 if name == "first" else 100)
with _in_its_turn(turn):
    work("is timed", times=150)
"""


def test_what_is_timed_is_timed_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that compile stand still while another has its turn, and all come to theirs."""
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "step.py").write_text(STEP)
    monkeypatch.setattr(measure_gpu, "ROOT", tmp_path)
    log, names = tmp_path / "log", ("first", "second", "third")
    log.touch()
    rows = [
        measure_gpu.Row(group=name, program="tools/step.py", words=("throughput", name, str(log))) for name in names
    ]
    ended = list(measure_gpu.measure(rows, "", each=60, together=3))
    assert {row.group: (found or {}).get("exit") for row, found in ended} == dict.fromkeys(names, 0)
    lines = [
        (float(when), name, doing)
        for when, name, doing in (line.split(" ", 2) for line in log.read_text().splitlines())
    ]
    for name in names:
        turn = [when for when, who, doing in lines if (who, doing) == (name, "is timed")]
        begins, ends = turn[0] + 0.5, turn[-1]
        assert begins < ends
        assert {who for when, who, _ in lines if begins < when < ends} == {name}
        if name == "first":
            compiling = [when for when, who, doing in lines if (who, doing) == ("second", "compiles")]
            assert compiling[0] < begins < ends < compiling[-1]


def test_what_stands_still_is_not_ended_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure_gpu, "ROOT", tmp_path)
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "step.py").write_text("import time; time.sleep(1)")
    job = measure_gpu.Job(measure_gpu.Row(group="step", program="tools/step.py", words=()), "", 5)
    job.stand_still(True)
    time.sleep(6)
    assert job.runs()
    job.stand_still(False)
    while job.runs():
        time.sleep(0.1)
    assert job.result()["exit"] == 0


def test_an_interruption_ends_what_is_measured_and_keeps_what_was(tmp_path: Path) -> None:
    """The program that is measured has a session of its own, which Ctrl-C does not reach."""
    script = (
        "import signal, sys, measure_gpu; sys.argv = ['measure_gpu.py', 'out.jsonl']; "
        # A program that a shell starts in the background ignores it, and so do its children.
        "signal.signal(signal.SIGINT, signal.default_int_handler); "
        f"step = measure_gpu._step(*{TINY}); endless = measure_gpu._run(*{TINY}, 'run.steps=1000000'); "
        "measure_gpu.ROWS = (endless, step, endless); measure_gpu.main()"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tools")}
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    ) as tool:
        children = Path(f"/proc/{tool.pid}/task/{tool.pid}/children")
        done, running = tmp_path / "out.jsonl", []
        try:
            while not (done.exists() and done.read_text()):
                assert tool.poll() is None
                time.sleep(0.1)
            while not (running := children.read_text().split()):
                assert tool.poll() is None
                time.sleep(0.1)
            time.sleep(1)  # until the tool waits for the program that it has just started
            tool.send_signal(signal.SIGINT)
            printed, _ = tool.communicate(timeout=60)
            assert not Path(f"/proc/{running[0]}").exists()
        finally:
            tool.kill()
            for process in running:
                with suppress(ProcessLookupError):
                    os.kill(int(process), signal.SIGKILL)
    assert printed.count("left out: ") == 2
    assert "interrupted" in printed
    assert len(done.read_text().splitlines()) == 1


def test_masks_are_timed_where_nothing_can_be_drawn() -> None:
    script = (
        "import sys; sys.modules['matplotlib'] = None; sys.argv = ['draw_masks.py', '--time']; import draw_masks; "
        "draw_masks.TIMED = draw_masks.WARM = 1; draw_masks.main()"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tools")}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" ms") == 8


def test_half_a_line_of_a_run_that_was_ended_is_no_number(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    rows = [f'{{"step": {step}, "train/images_per_second": {step}.0}}' for step in (1, 2, 3)]
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(rows) + "\n" + rows[0][:20])
    assert measure_gpu._numbers(tmp_path) == {"images_per_second": 2.5}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["out.jsonl", "--only", "step"], "there is no group step; allowed: steps, "),
        (["absent/out.jsonl"], "absent/out.jsonl: cannot be written (No such file or directory); name a file"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_measured(words: list[str], told: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "measure_gpu.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert told in done.stderr
