"""Measure what docs/performance.md says of a GPU, on the one that is here, in one command.

`python tools/measure_gpu.py OUT.jsonl --photos 'photos/*.tar'` runs the commands of that page, each in a process of its
own, and writes a line of JSON after each: the command, its exit code, its seconds, the end of what it printed, and its
numbers. At the end it prints them as a Markdown table. Steps come first, the most telling before the others:
`--together` of them compile side by side, and while one is timed the others stand still. Then comes what runs alone.
What does not fit into `--minutes` is left out and named; what takes longer than `--each` is ended, and says where it
was. `--only steps,masks` measures some groups; `--list` prints the commands.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
_GRAPHS = "trainer.compile_mode=reduce_overhead"
_BASE = ("recipe=hjepa", "model=vit_base_patch16", "data.batch_size=256", "masks.target_tokens=35")
_LARGE = ("recipe=hjepa", "model=vit_large_patch16", "hjepa.predictor.depth=12", "data.batch_size=128")
_FLAT = ("hjepa.pyramid.levels=1", "hjepa.level_weights.weights=[1.0]", "hjepa.pyramid.fpn=none")
_SMALL = ("preset=small_images", "data.train=synthetic", "data.batch_size=256")
_FAREWELL, _LOOK = 5.0, 0.05  # seconds
_QUIET = ("eval.at_end=false", "eval.every_steps=null")


@dataclass(frozen=True, kw_only=True)
class Row:
    """A command and what is asked of it.

    Attributes:
        group: what `--only` chooses by.
        program: a program of the workspace, or a script of this repository.
        words: its arguments; `{photos}`, `{json}` and `{run}` stand for the shards and for places of this row alone,
            `{noise}` for a batch of images that are made for it.
        reach: the goal, in words.
        cold: nothing is in the compiler's cache.
    """

    group: str
    program: str
    words: tuple[str, ...]
    reach: str = ""
    cold: bool = False


def _step(*words: str, reach: str = "", options: tuple[str, ...] = ("--no-parts",), group: str = "steps") -> Row:
    words = ("throughput", "--steps", "30", "--json", "{json}", *options, *words)
    return Row(group=group, program="hjepa-benchmark", words=words, reach=reach)


def _run(*words: str, reach: str = "", group: str = "program", cold: bool = False) -> Row:
    return Row(group=group, program="hjepa-pretrain", words=("run.dir={run}", *words), reach=reach, cold=cold)


ROWS = (
    _step(*_BASE, _GRAPHS, reach="4,200 images/s, 12 GiB; pyramid and losses 5 %", options=()),
    _step(*_LARGE, _GRAPHS, reach="1,600 images/s, 50 % of the peak"),
    _step(*_BASE, *_FLAT, _GRAPHS, reach="4,500 images/s", options=("--no-parts", "--reference")),
    _run(
        *_BASE, _GRAPHS, *_QUIET, "trainer.compile=true", "data.train={photos}", "data.workers=14", "run.steps=150",
        "trainer.log_every=10", reach="95 % of the first row",
    ),
    _step(*_LARGE, _GRAPHS, "trainer.fp8=true", group="fp8"),
    _step(
        "recipe=hjepa", "model=vit_huge_patch14", "hjepa.predictor.depth=12", "data.batch_size=64", _GRAPHS,
        reach="663 images/s",
    ),
    Row(group="masks", program="tools/draw_masks.py", words=("--time", "--device", "cuda"), reach="1 ms"),
    _step(*_SMALL, _GRAPHS, group="small"),
    _step(*_SMALL, _GRAPHS, "recipe=simclr", group="small"),
    Row(
        group="loader", program="hjepa-benchmark",
        words=("loader", "{photos}", "--workers", "16", "--images", "5000", "--repeats", "1"),
        reach="6,500 images/s on 16 cores, 12,000 with nvJPEG",
    ),
    _run(
        *_BASE, _GRAPHS, *_QUIET, "data.train={noise}", "trainer.compile=true", "run.steps=2",
        group="start", cold=True, reach="60 s until the first step",
    ),
    _step(*_BASE, _GRAPHS, "trainer.fp8=true", group="fp8"),
    _step(*_BASE, group="switches"),
    _step(*_SMALL, group="small"),
    _step(*_SMALL, "recipe=simclr", group="small"),
)  # fmt: skip


Found: TypeAlias = dict[str, Any] | None


def _numbers(folder: Path) -> dict[str, Any]:
    """Return what a command has measured, from the files that it wrote."""
    found: dict[str, Any] = {}
    if (folder / "row.json").exists():
        found = json.loads((folder / "row.json").read_text())
        found.pop("command", None)
    metrics = folder / "run" / "metrics.jsonl"
    if metrics.exists():
        # A program that was ended may have left half a line.
        lines = [json.loads(line) for line in metrics.read_text().splitlines() if line.endswith("}")]
        speeds = [line["train/images_per_second"] for line in lines if "train/images_per_second" in line]
        # The compiler works in the first half of a short run.
        found["images_per_second"] = statistics.median(speeds[len(speeds) // 2 :]) if speeds else None
    return found


class Job:
    """A row that is being measured.

    Args:
        row: what runs.
        photos: where the shards lie.
        seconds: until it is ended; those in which it stands still do not count.
        turn: the file by which steps take turns.
    """

    def __init__(self, row: Row, photos: str, seconds: float, turn: Path | None = None) -> None:
        self.row = row
        self._place = tempfile.TemporaryDirectory()
        self._folder = folder = Path(self._place.name)
        places = {"photos": photos, "json": str(folder / "row.json"), "run": str(folder / "run")}
        if any("{noise}" in word for word in row.words):
            places["noise"] = str(_write_noise(folder / "noise"))
        words = [_fill(word, places) for word in row.words]
        if turn is not None and "throughput" in words:
            words += ["--turn", str(turn)]
        script = row.program.startswith("tools/")
        program = [str(ROOT / row.program)] if script else ["-m", row.program.replace("-", "_")]
        cache = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")} if row.cold else {}
        self._began = time.monotonic()
        self._ends, self._still = self._began + seconds, 0.0
        with (folder / "printed").open("w") as printed:
            self.process = subprocess.Popen(
                [sys.executable, *program, *words],
                # A program that has to be killed shows what it has printed, and where it is.
                env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1", **cache},
                stdout=printed,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def runs(self) -> bool:
        """Say whether it goes on; one whose time is over is ended first."""
        if self.process.poll() is None and not self._still and time.monotonic() > self._ends:
            self.process.send_signal(signal.SIGABRT)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(_FAREWELL)
            self.kill()
        return self.process.poll() is None

    def stand_still(self, still: bool) -> None:
        """Stop or continue it with its workers."""
        if still == bool(self._still):
            return
        now = time.monotonic()
        self._ends += 0.0 if still else now - self._still
        self._still = now if still else 0.0
        self._signal(signal.SIGSTOP if still else signal.SIGCONT)

    def kill(self) -> None:
        """End it with its workers, where it has any, which would hold the GPU."""
        self._signal(signal.SIGKILL)
        self.process.wait()

    def result(self) -> dict[str, Any]:
        """Return what is known of it at its end, and forget its files."""
        self.kill()
        printed = (self._folder / "printed").read_text(errors="replace")
        numbers = _numbers(self._folder)
        self._place.cleanup()
        return {
            "group": self.row.group,
            "command": _shown(self.row),
            "reach": self.row.reach,
            "exit": self.process.returncode,
            "seconds": round(time.monotonic() - self._began, 1),
            **numbers,
            "printed": printed[-20000:],
        }

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


def measure(
    rows: Sequence[Row], photos: str, *, each: float, end: float = math.inf, together: int = 1
) -> Iterator[tuple[Row, Found]]:
    """Run commands, and give what is known of each as it ends.

    Args:
        rows: what runs.
        photos: where the shards lie.
        each: seconds for a command.
        end: of the clock `time.monotonic`; nothing begins after it, and what runs then is ended.
        together: how many run side by side.

    Yields:
        A row, and what was found: None where there was no time for it.
    """
    waiting, running = list(rows), list[Job]()
    with tempfile.TemporaryDirectory() as folder:
        turn = Path(folder) / "turn"
        turn.touch()
        try:
            while waiting or running:
                timed = turn.read_text()
                alone = next((job for job in running if str(job.process.pid) == timed), None)
                for job in running:
                    job.stand_still(alone not in (None, job))
                left = end - time.monotonic()
                if waiting and alone is None and len(running) < together:
                    row = waiting.pop(0)
                    if left > 0:
                        running.append(Job(row, photos, min(each, left), turn if together > 1 else None))
                    else:
                        yield row, None
                for job in [job for job in running if not job.runs()]:
                    running.remove(job)
                    yield job.row, job.result()
                time.sleep(_LOOK)
        finally:
            for job in running:
                job.result()


def _write_noise(folder: Path) -> Path:
    """Write coarse noise as a shard of JPEGs and return where it lies."""
    # Torch takes seconds, and --list should not.
    from hjepa_data.shards.write import ShardWriter

    pixels = np.random.default_rng(0).integers(0, 256, (256, 8, 8, 3), dtype=np.uint8)
    with ShardWriter(folder) as writer:
        for one in pixels:
            jpeg = io.BytesIO()
            Image.fromarray(one).resize((256, 256)).save(jpeg, format="JPEG")
            writer.write(jpeg.getvalue())
    return writer.shards[0]


def _shown(row: Row) -> str:
    return shlex.join([row.program, *row.words])


def _fill(word: str, places: dict[str, str]) -> str:
    for name, value in places.items():
        word = word.replace(f"{{{name}}}", value)
    return word


def table(results: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown."""
    lines = ["| command | to reach | images/s | ms | GiB | of the peak | over the plain step | s |", "|---" * 8 + "|"]
    for found in results:
        plain = (found.get("reference") or {}).get("speedup")
        cells = [
            f"`{found['command']}`",
            found["reach"],
            _cell(found.get("images_per_second"), ",.0f"),
            _cell(found.get("milliseconds"), ".1f"),
            _cell(found.get("peak_gib"), ".1f"),
            _cell(found.get("utilisation"), ".0%"),
            _cell(plain, ".2f"),
            f"{found['seconds']:.0f}" + (f", exit {found['exit']}" if found["exit"] else ""),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def main() -> None:
    """Measure what was asked for."""
    groups = list(dict.fromkeys(row.group for row in ROWS))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", nargs="?", type=Path, help="lines of JSON; those that are there stay")
    parser.add_argument("--photos", help="shards of 5,000 JPEGs or more; without, rows that read some are left out")
    parser.add_argument("--only", help=f"groups, with commas between: {', '.join(groups)}")
    parser.add_argument("--together", type=int, default=4, help="steps that compile side by side (default 4)")
    parser.add_argument("--minutes", type=float, default=60.0, help="begin nothing after these, and end what runs then")
    parser.add_argument("--each", type=float, default=4.0, help="end a command after these minutes (default 4)")
    parser.add_argument("--list", action="store_true", help="print the commands and do nothing")
    options = parser.parse_args()
    asked = options.only.split(",") if options.only else groups
    if unknown := sorted(set(asked) - set(groups)):
        parser.error(f"--only={options.only}: there is no group {unknown[0]}; allowed: {', '.join(groups)}")
    rows = [row for row in ROWS if row.group in asked]
    if options.list:
        print("\n".join(map(_shown, rows)))
        return
    if options.output is None:
        parser.error("say where the numbers go: a file OUT.jsonl")
    try:
        options.output.touch()
    except OSError as error:
        parser.error(f"{options.output}: cannot be written ({error.strerror}); name a file in a folder that is there")
    if options.together < 1:
        parser.error(f"--together={options.together}: nothing would run; allowed: 1 and more")
    results: list[dict[str, Any]] = []
    blind = [row for row in rows if options.photos is None and any("{photos}" in word for word in row.words)]
    left = [f"{_shown(row)}: no --photos" for row in blind]
    todo = [row for row in rows if row not in blind]
    steps = [row for row in todo if "throughput" in row.words]
    others = [row for row in todo if row not in steps]
    end = time.monotonic() + 60 * options.minutes
    try:
        for together, some in ((options.together, steps), (1, others)):
            for row, found in measure(some, options.photos or "", each=60 * options.each, end=end, together=together):
                todo.remove(row)
                if found is None:
                    left.append(f"{_shown(row)}: no time left")
                    continue
                results.append(found)
                with options.output.open("a") as file:
                    file.write(json.dumps(found) + "\n")
                print(table([found]).splitlines()[-1], flush=True)
    except KeyboardInterrupt:
        left += [f"{_shown(row)}: interrupted" for row in todo]
    print(f"\n{table(results)}")
    print("".join(f"\nleft out: {line}" for line in left))


if __name__ == "__main__":
    main()
