"""A small real data set in shards, and the pretrain program run as its users run it: as a command."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from hjepa_pretrain.cli import main
from hjepa_pretrain.demo import CLASS_NAMES, compose_demo
from hjepa_pretrain.demo.shards import write_demo_shards

TINY = (
    "model=vit_nano_patch8",
    "hjepa.encoder.embed_dim=32",
    "hjepa.encoder.num_heads=2",
    "hjepa.encoder.depth=2",
    "hjepa.predictor.embed_dim=16",
    "hjepa.predictor.num_heads=2",
    "hjepa.predictor.depth=1",
    "hjepa.pyramid.fpn_dim=32",
    "masks.num_targets=2",
    "data.image_size=[32,32]",
    "data.batch_size=16",
    "data.workers=0",
    "run.steps=12",
    "run.threads=1",
    "trainer.log_every=1",
    "trainer.learning_rate.warmup_steps=2",
    "eval.every_steps=null",
)


PROGRAM = ("-m", "hjepa_pretrain")
HELD = (str(Path(__file__).parent / "scripts" / "held.py"),)
# A file that cannot grow behaves as one on a full disk: the write fails.
LIMITED = """
import resource, sys
from hjepa_pretrain.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))
sys.exit(main())
"""


@dataclass(frozen=True)
class Finished:
    code: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """The last line on the error stream: what a user reads."""
        return self.err.strip().splitlines()[-1] if self.err.strip() else ""


class Pretrain:
    """Runs `python -m hjepa_pretrain` in its own process group."""

    def __init__(self, shards: Path) -> None:
        self.shards = shards
        self.data = (f"data.train={shards}/train-*.tar", f"data.eval={shards}/eval-*.tar")
        self.tiny = TINY

    def start(
        self, *words: str, ranks: int = 1, torchrun: Sequence[str] = (), program: Sequence[str] = PROGRAM, **env: str
    ) -> subprocess.Popen[str]:
        command = [sys.executable, *program]
        if ranks > 1:
            command = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                f"--nproc-per-node={ranks}",
                *torchrun,
                *command[1:],
            ]
        return subprocess.Popen(
            [*command, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **env},
            start_new_session=True,
        )

    def __call__(self, *words: str, ranks: int = 1, timeout: float = 500, file_size: int | None = None) -> Finished:
        program = PROGRAM if file_size is None else ("-c", LIMITED.format(size=file_size))
        process = self.start(*words, ranks=ranks, program=program)
        try:
            out, err = process.communicate(timeout=timeout)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        return Finished(process.returncode, out, err)

    def here(self, capsys: pytest.CaptureFixture[str], *words: str) -> Finished:
        """Runs the program in this process, which saves the seconds that imports take."""
        capsys.readouterr()
        code = main(words)
        captured = capsys.readouterr()
        return Finished(code, captured.out, captured.err)

    def kill_after(self, run_dir: Path, rows: int, *words: str) -> None:
        """Starts a run and kills it, workers and all, once `metrics.jsonl` has this many training rows."""
        self.disturb(lambda process: os.killpg(process.pid, signal.SIGKILL), run_dir, rows, *words)

    def disturb(
        self,
        how: Callable[[subprocess.Popen[str]], None],
        run_dir: Path,
        rows: int,
        *words: str,
        ranks: int = 1,
        torchrun: Sequence[str] = (),
        release: bool = True,
    ) -> Finished:
        """Starts a run, does something to its process once `metrics.jsonl` has so many training rows, awaits the end.

        However late that comes, the run has gone no further: it waits there.

        Args:
            how: what is done to the process, which is torchrun's where there are several ranks.
            run_dir: folder of the run.
            rows: of `metrics.jsonl`, those of earlier sittings among them; one for each step.
            words: further settings.
            ranks: number of processes.
            torchrun: flags of torchrun.
            release: let the run go on then; else it waits until a signal has reached it.
        """
        leash = run_dir.with_name(f"{run_dir.name}.leash")
        leash.touch()
        hold = {"HOLD_FILE": str(leash), "HOLD_STEP": str(rows)}
        process = self.start(f"run.dir={run_dir}", *words, ranks=ranks, torchrun=torchrun, program=HELD, **hold)
        deadline = time.monotonic() + 300
        try:
            while len(losses(run_dir)) < rows:
                assert process.poll() is None, process.communicate()[1]
                assert time.monotonic() < deadline, "the run made no progress"
                time.sleep(0.01)
            how(process)
            if release:
                leash.unlink()
            out, err = process.communicate(timeout=300)
        finally:
            leash.unlink(missing_ok=True)
            if process.poll() is None:
                for worker in workers(process):
                    os.kill(worker, signal.SIGKILL)
                os.killpg(process.pid, signal.SIGKILL)
        return Finished(process.returncode, out, err)


def workers(process: subprocess.Popen[str]) -> list[int]:
    """Return the numbers of the processes that torchrun has started, each in a session of its own."""
    return [int(number) for number in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def rows(run_dir: Path) -> list[dict[str, float]]:
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        return []
    lines = path.read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]


def losses(run_dir: Path) -> list[tuple[int, float]]:
    return [(int(row["step"]), row["train/loss"]) for row in rows(run_dir) if "train/loss" in row]


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for split, count in (("train", 300), ("eval", 120)):
        write_demo_shards(compose_demo(split, count, seed=7), folder, split, samples_per_shard=60)
    assert len(CLASS_NAMES) == 10
    return folder


@pytest.fixture(scope="session")
def pretrain(shards: Path) -> Pretrain:
    return Pretrain(shards)


@pytest.fixture
def tiny(pretrain: Pretrain) -> tuple[str, ...]:
    return (*pretrain.data, *TINY)


@pytest.fixture
def read_losses() -> Callable[[Path], list[tuple[int, float]]]:
    return losses


@pytest.fixture
def read_rows() -> Callable[[Path], list[dict[str, float]]]:
    return rows


@pytest.fixture
def workers_of() -> Callable[[subprocess.Popen[str]], list[int]]:
    return workers
