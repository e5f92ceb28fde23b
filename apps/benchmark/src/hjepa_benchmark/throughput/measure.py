"""Measures a step, prints the table, keeps the numbers."""

import json
import os
import platform
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from hjepa_benchmark.runs import device_of
from hjepa_benchmark.throughput.clock import milliseconds, wait
from hjepa_benchmark.throughput.count import (
    compiled_graph_breaks,
    graph_breaks,
    host_synchronisations,
    matmul_peak,
    operations,
    operations_of,
)
from hjepa_benchmark.throughput.reference import ReferenceStep
from hjepa_benchmark.throughput.step import TrainingStep
from hjepa_pretrain import settings
from hjepa_pretrain.config import PretrainConfig
from hjepa_pretrain.uncut import uncut
from hjepa_train import ParallelKind
from hjepa_train.graph import CompileMode

_WARMUP = 5
_TOGETHER = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """The plain step beside ours.

    Attributes:
        images_per_second: of one process.
        milliseconds: median of a step.
        operations: floating-point operations of its matrix products.
        peak_gib: largest memory on the GPU beyond what ours holds; None on a CPU.
        speedup: its time over ours, median over steps that followed each other.
    """

    images_per_second: float
    milliseconds: float
    operations: float
    peak_gib: float | None
    speedup: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Throughput:
    """What a step takes.

    Attributes:
        images_per_second: images (not views) of one process.
        milliseconds: median length of a step, over groups with one masked step each.
        steps: how many were timed: those asked for, or what fills the last group.
        parts: milliseconds of each part, timed apart from the whole and from one another; none where they are left out.
        operations: floating-point operations of the matrix products of a step, forward and backward.
        matmul_peak: operations a second that large matrix products reach here, in the step's precision.
        utilisation: operations a second of the step over that peak.
        peak_gib: largest memory that torch held on the GPU; None on a CPU.
        graph_breaks: places where the compiler would cut the model's forward pass.
        host_synchronisations: times that a step lets the host wait; None on a CPU.
        context_tokens: visible patches of a masked view; None where nothing is masked.
        target_tokens: blocks and tokens of each; likewise.
        reference: the plain step, where it was asked for.
    """

    images_per_second: float
    milliseconds: float
    steps: int
    parts: dict[str, float]
    operations: float
    matmul_peak: float
    utilisation: float
    peak_gib: float | None
    graph_breaks: int
    host_synchronisations: int | None
    context_tokens: int | None
    target_tokens: tuple[int, int] | None
    reference: Reference | None = None


def measure_throughput(
    config: PretrainConfig, *, steps: int, reference: bool = False, parts: bool = True, turn: Path | None = None
) -> Throughput:
    """Times whole steps, then their parts; with a reference, step by step in turn.

    Args:
        config: of the run to be measured.
        steps: timed steps, after a few that are not.
        reference: also time a plain I-JEPA step at the same numbers of tokens.
        parts: also time the parts, each of which is compiled by itself.
        turn: a file by which programs take turns: what is compiled is compiled beside them, and timed alone.
    """
    device = device_of(config.run.device)
    cuda = device.type == "cuda"
    step = TrainingStep(config, device)
    context, targets = step.draw_masks()
    counted = operations(step)
    step.recompute()
    compiled = config.trainer.compile
    breaks = 0 if compiled else graph_breaks(step)
    step.compile()
    if compiled:
        breaks = compiled_graph_breaks(partial(_repeat, step, step.every))
    if turn is not None and parts:
        step.parts(repeats=1, warmup=0)
        if cuda:
            torch.cuda.empty_cache()
    with _in_its_turn(turn):
        _repeat(step, step.every * _WARMUP)
        peak = None
        if cuda:
            wait(device)
            torch.cuda.reset_peak_memory_stats()
            _repeat(step, step.every)
            wait(device)
            # A graph that is replayed allocates nothing: its memory is what torch keeps for it.
            graphs = compiled and config.trainer.compile_mode is not CompileMode.default
            peak = (torch.cuda.max_memory_reserved() if graphs else torch.cuda.max_memory_allocated()) / 2**30
        plain, held = None, torch.cuda.memory_allocated() if cuda else 0
        if reference:
            assert context is not None
            assert targets is not None
            plain = ReferenceStep(config, context, targets, device)
            for _ in range(_WARMUP):
                plain()
            if cuda:
                torch.cuda.reset_peak_memory_stats()
        ours, theirs, timed = _in_turn(step, plain, steps, device)
        length = statistics.median(ours)
        found = None
        if plain is not None:
            found = Reference(
                images_per_second=1e3 * len(step.batch) / statistics.median(theirs),
                milliseconds=statistics.median(theirs),
                operations=operations_of(plain.forward_backward),
                peak_gib=_peak_of(plain, held, device) if cuda else None,
                speedup=statistics.median(other / own for own, other in zip(ours, theirs, strict=True)),
            )
            del plain
        flops_peak = matmul_peak(config.trainer.precision, device)
        return Throughput(
            images_per_second=1e3 * len(step.batch) / length,
            milliseconds=length,
            steps=timed,
            parts=step.parts(repeats=max(3, steps // step.every // 2), warmup=2) if parts else {},
            operations=counted,
            matmul_peak=flops_peak,
            utilisation=counted / (length / 1e3) / flops_peak,
            peak_gib=peak,
            graph_breaks=breaks,
            host_synchronisations=host_synchronisations(step),
            context_tokens=None if context is None else context.shape[1],
            target_tokens=None if targets is None else (targets.shape[1], targets.shape[2]),
            reference=found,
        )


def print_throughput(
    words: Sequence[str],
    *,
    steps: int,
    reference: bool,
    output: Path | None,
    parts: bool = True,
    turn: Path | None = None,
) -> None:
    """Measures the run that these settings describe and prints a table.

    Without `data.train` and `model` it is the demo; with a `model` it is that model on synthetic images of the
    recipe's size. On a GPU the step is compiled unless `trainer.compile` is given.

    Args:
        words: settings of hjepa-pretrain.
        steps: timed steps.
        reference: also time a plain I-JEPA step.
        output: also write the numbers to this JSON file.
        parts: also time the parts.
        turn: a file by which programs take turns; it is made.

    Raises:
        ValueError: a setting is wrong, or there is no step to time.
    """
    keys = {word.partition("=")[0] for word in words}
    added = []
    if "model" in keys and not keys & {"data.train", "preset", "run.dir"}:
        added.append("data.train=synthetic")
    if torch.cuda.is_available() and "trainer.compile" not in keys and "run.device=cpu" not in words:
        added.append("trainer.compile=true")
    config, _ = settings.load([*added, *words])
    every = 1 if config.baseline is not None else config.hjepa.predict_every
    if steps < every:
        raise ValueError(f"--steps={steps}: too few; allowed: hjepa.predict_every={every} and more")
    if config.trainer.accumulate > 1 or config.parallel is not ParallelKind.single:
        raise ValueError(
            f"parallel={config.parallel} trainer.accumulate={config.trainer.accumulate}: throughput times one process "
            "and one batch; give parallel=single trainer.accumulate=1 and the data.batch_size of one process"
        )
    if reference and (config.baseline is not None or not config.hides_patches):
        raise ValueError(f"--reference: the plain step is an I-JEPA, {config.recipe} has no masks; leave it out")
    threads = torch.get_num_threads()
    torch.set_num_threads(config.run.threads or threads)
    try:
        found = measure_throughput(config, steps=steps, reference=reference, parts=parts, turn=turn)
    finally:
        torch.set_num_threads(threads)
    Console(soft_wrap=True).print(_table(found, config))
    if output is not None:
        content = {"command": ["hjepa-benchmark", "throughput", *words], **_about(config), **asdict(found)}
        output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _in_its_turn(file: Path | None) -> Iterator[None]:
    """Wait until no other program has its turn; meanwhile the file says which process has."""
    if file is None:
        yield
        return
    import fcntl  # not on Windows

    with file.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        file.write_text(str(os.getpid()), encoding="utf-8")
        try:
            yield
        finally:
            file.write_text("", encoding="utf-8")


def _repeat(step: TrainingStep, count: int) -> None:
    for number in range(count):
        step(number)


def _in_turn(
    step: TrainingStep, plain: ReferenceStep | None, steps: int, device: torch.device
) -> tuple[list[float], list[float], int]:
    """Milliseconds of a step in groups with as many masked steps as a run has, and of the plain steps between them.

    The third is how many steps of ours that were.
    A GPU is given several groups at once: as in a run, the host is ahead of it and prepares the next step.
    """
    ours, theirs = [], []
    together = min(steps // step.every, _TOGETHER) if device.type == "cuda" else 1

    def plain_steps() -> None:
        assert plain is not None
        for _ in range(together):
            plain()

    # Groups that would not fill the last turn are timed too: more than was asked for, never less.
    for _ in range(-(-steps // (step.every * together))):
        ours.append(milliseconds(partial(_repeat, step, together * step.every), device) / together / step.every)
        if plain is not None:
            theirs.append(milliseconds(plain_steps, device) / together)
    return ours, theirs, len(ours) * together * step.every


def _peak_of(plain: ReferenceStep, held: int, device: torch.device) -> float:
    torch.cuda.reset_peak_memory_stats()
    plain()
    wait(device)
    return (torch.cuda.max_memory_allocated() - held) / 2**30


def _about(config: PretrainConfig) -> dict[str, object]:
    cuda = device_of(config.run.device).type == "cuda"
    return {
        "recipe": config.recipe,
        "model": config.model,
        "batch_size": config.data.batch_size,
        "views": config.data.views,
        "local_views": config.data.local_views,
        "image_size": list(config.data.image_size),
        "precision": str(config.trainer.precision),
        "compiled": config.trainer.compile,
        "compile_mode": str(config.trainer.compile_mode),
        "fp8": config.trainer.fp8,
        "device": torch.cuda.get_device_name() if cuda else f"cpu, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _table(found: Throughput, config: PretrainConfig) -> Table:
    about = _about(config)
    views = [f"{group.count} views of {'x'.join(map(str, group.size))}" for group in config.data.stream(1).views]
    masks = ""
    if found.target_tokens is not None:
        masks = f"{found.context_tokens} context tokens, targets {'x'.join(map(str, found.target_tokens))}, "
    table = Table(
        title=f"{config.recipe} {config.model}, batch {config.data.batch_size}, {' and '.join(views)}, "
        f"{masks}{about['precision']}, "
        f"{'compiled' if config.trainer.compile else 'eager'}, {about['device']}",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    together = sum(found.parts.values())
    alone = f"; parts are timed in {together:.1f} ms steps of their own" if found.parts else ""
    table.caption, table.caption_justify = f"median of {found.steps} steps{alone}", "left"
    table.add_column("what")
    table.add_column("step", justify="right")
    if found.reference is not None:
        table.add_column("plain I-JEPA step", justify="right")
    other = found.reference

    def row(name: str, own: str, reference: str = "-") -> None:
        table.add_row(name, own, *([reference] if other is not None else []))

    row(
        "speed",
        f"{found.images_per_second:,.0f} images/s",
        "" if other is None else f"{other.images_per_second:,.0f} images/s",
    )
    row("length", f"{found.milliseconds:.1f} ms a step", "" if other is None else f"{other.milliseconds:.1f} ms a step")
    # Shares of their own sum: they are timed in rounds of their own, when the machine may be faster or slower.
    for name, value in found.parts.items():
        row(f"  {name}", f"{value:.2f} ms ({100 * value / together:.0f} %)")
    row(
        "counted operations",
        f"{found.operations / 1e9:,.4g} GFLOP",
        "" if other is None else f"{other.operations / 1e9:,.4g} GFLOP",
    )
    row(
        "done",
        _rate(found.operations, found.milliseconds),
        "" if other is None else _rate(other.operations, other.milliseconds),
    )
    peak = found.matmul_peak / 1e12
    row(f"of the matmul peak, {peak:.2f} TFLOP/s", f"{100 * found.utilisation:.0f} %",
        "" if other is None else f"{other.operations / other.milliseconds / 1e7 / peak:.0f} %")  # fmt: skip
    row("peak memory", _gib(found.peak_gib), "" if other is None else _gib(other.peak_gib))
    row("graph breaks", str(found.graph_breaks))
    row("host synchronisations", "-" if found.host_synchronisations is None else str(found.host_synchronisations))
    if other is not None:
        row("speed over the plain step", f"{other.speedup:.2f}", "1")
    return uncut(table)


def _rate(operations: float, milliseconds: float) -> str:
    return f"{operations / milliseconds / 1e9:,.3g} TFLOP/s"


def _gib(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} GiB"
