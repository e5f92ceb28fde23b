"""A run from its configuration to its folder: data, task, trainer, results, report."""

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.text import Text

from hjepa_data import DataError, Decode, DevicePrefetcher, Source
from hjepa_eval import Measurement, write_results
from hjepa_models import Block
from hjepa_pretrain import settings
from hjepa_pretrain.baselines import BaselineKind
from hjepa_pretrain.claim import claim
from hjepa_pretrain.config import PretrainConfig
from hjepa_pretrain.dry_run import dry_run
from hjepa_pretrain.evaluation import OnlineEvaluation, load_pair, measure, open_sources
from hjepa_pretrain.failures import OtherRankError, Stopped
from hjepa_pretrain.model import Model, command, save_model
from hjepa_pretrain.provenance import provenance
from hjepa_pretrain.results import RESULTS_FILE, measured_before, results_of, results_table
from hjepa_pretrain.task import PretrainTask, build_task
from hjepa_pretrain.train_time import LONG, measure_step
from hjepa_train import (
    Callback,
    CheckpointError,
    CollapseMonitor,
    EarlyStop,
    Measure,
    Outcome,
    Profiler,
    ProgressBar,
    StepResult,
    TimeLimit,
    Trainer,
    World,
    build_loggers,
    init_world,
    leave_world,
)

logger = logging.getLogger(__name__)

Sources = tuple[Source, Source | None]
T = TypeVar("T")
# What a finished run holds beside its results.
_LEFT = ("model.safetensors", "config.json", "report.html")


class SkippedImages(Callback):
    """Logs `data/skipped`, the images left out since the run began, over all ranks, and says so at the end."""

    def __init__(self, every: int, console: Console) -> None:
        self._every = every
        self._console = console
        self._trainer: Trainer | None = None
        self._before = 0
        self._known = 0

    def on_fit_start(self, trainer: Trainer) -> None:
        """Learn whose stream is counted."""
        self._trainer = trainer

    def state_dict(self) -> dict[str, int]:
        """Keep the count over interruptions; every rank saves, so every rank takes part."""
        return {"skipped": self._before if self._trainer is None else self._total(self._trainer)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on counting."""
        self._before = self._known = state["skipped"]

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        """Count where a row is written."""
        if trainer.step % self._every == 0 or trainer.step == trainer.config.steps:
            total = self._total(trainer)
            if total:
                trainer.log({"data/skipped": float(total)})

    def on_fit_end(self, trainer: Trainer, outcome: Outcome | None) -> None:
        """Say what was left out, with the reasons that this process saw."""
        # What the last row or save has counted: a run may fail on one rank alone, and nobody would answer.
        if self._known and trainer.world.is_main:
            skipped = self._skipped(trainer)
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()))
            self._console.print(f"left out: {self._known} images ({reasons or 'in other processes'})", highlight=False)

    def _total(self, trainer: Trainer) -> int:
        mine = torch.tensor(sum(self._skipped(trainer).values()), device=trainer.world.device)
        self._known = self._before + int(trainer.world.sum(mine))
        return self._known

    @staticmethod
    def _skipped(trainer: Trainer) -> dict[str, int]:
        skipped: dict[str, int] = trainer.stream.skipped  # type: ignore[attr-defined]
        return skipped


class RunRecord(Callback):
    """Writes `config.yaml` once checkpoint and loggers are accepted; each sitting adds where it comes from."""

    def __init__(self, plain: DictConfig, words: list[str], folder: Path) -> None:
        self._plain, self._words, self._folder = plain, words, folder

    def on_fit_start(self, trainer: Trainer) -> None:
        """Write the file."""
        if trainer.world.is_main:
            before = settings.read_provenance(self._folder)
            if before and trainer.step == 0:
                logger.warning("%s holds no checkpoint: the run begins again", self._folder)
            settings.save(self._plain, [*before, provenance(self._words, trainer.world.device)], self._folder)

    def on_save(self, trainer: Trainer) -> None:
        """Drop the results of an earlier end: they are not of the weights that come now."""
        if trainer.world.is_main:
            (self._folder / RESULTS_FILE).unlink(missing_ok=True)


def pretrain(config: PretrainConfig, plain: DictConfig, words: list[str], console: Console) -> Outcome:
    """Train, or go on with a run; then measure it and write what it leaves.

    Args:
        config: the run.
        plain: the same as it is stored.
        words: the command line, for the record.
        console: where tables go.

    Returns:
        Done, or preempted with everything saved.

    Raises:
        ValueError: the configuration, the data or a checkpoint cannot be used.
    """
    started = time.monotonic()
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    if config.plan.dry:
        dry_run(words, config, console)
        return Outcome.DONE
    world = init_world(config.trainer.parallel)
    with ExitStack() as held:
        try:
            sources = _sources(config, world)
            folder = _name(config, world)
            if config.run.train_time is not None:
                config, plain = _fit_to_time(config, words, sources, world, folder, console, started)
            config.trainer.samples_per_epoch = len(sources[0])
            if config.plan.show or config.plan.find_lr:
                _plan(config, plain, sources, world, console, started)
                return Outcome.DONE
            trainer = _prepare(config, plain, words, sources, world, folder, console, started, held)
            try:
                outcome = trainer.fit()
            except CheckpointError as error:
                raise CheckpointError(settings.in_full(str(error), words)) from error
        finally:
            leave_world()
        if outcome is Outcome.DONE and world.is_main:
            with _stopped_in_time(config, started):
                if trainer.stop_reason is not None:
                    # It came in the last step, which is done and saved; what follows takes minutes.
                    Stopped.by(trainer.stop_reason)
                _finish(config, trainer, sources, folder, console)
    return outcome


def _plan(
    config: PretrainConfig, plain: DictConfig, sources: Sources, world: World, console: Console, started: float
) -> None:
    """Show what a run would do, and leave no run behind."""
    from hjepa_pretrain.plan import find_learning_rate, show_schedules  # matplotlib takes a while to import

    if config.plan.show and world.is_main:
        show_schedules(config, console)
    if config.plan.find_lr:
        _count_classes(config, plain, sources[0])
        limit = _time_limit(config, started)
        find_learning_rate(config, build_task(config), _stream(config, sources, world), world, console, limit)


def _together(world: World, work: Callable[[], T]) -> T:
    """Do what may fail in one process only, and let all of them hear of it: nobody waits for one that is gone."""
    problem: Exception | None = None
    result: list[T] = []
    try:
        result.append(work())
    except (ValueError, OSError) as error:
        problem = error
    failed, main_failed = world.any(problem is not None, problem is not None and world.is_main)
    if problem is not None and (world.is_main or not main_failed):
        raise problem
    if failed:
        raise OtherRankError("another process could not start; its line says why")
    return result[0]


def _sources(config: PretrainConfig, world: World) -> Sources:
    """Open the shards; the demo's are made by the main rank, the others wait for them."""
    if config.data.train is None and world.size > 1:
        _together(world, lambda: open_sources(config) if world.is_main else None)
    sources = _together(world, lambda: open_sources(config))
    if len(sources[0]) < config.data.batch_size:
        raise DataError(
            f"data.train={config.data.train}: holds {len(sources[0])} images, less than one batch of data.batch_size="
            f"{config.data.batch_size}; lower the batch or give more shards"
        )
    return sources


def _fit_to_time(
    config: PretrainConfig,
    words: list[str],
    sources: Sources,
    world: World,
    folder: Path,
    console: Console,
    started: float,
) -> tuple[PretrainConfig, DictConfig]:
    """Compose the run of as many steps as there is time for; one that has begun has its steps already."""
    if settings.holds_run(folder):
        return settings.load([*words, f"run.dir={folder}"], quiet=True)
    limit = config.run.train_time_seconds
    assert limit is not None
    timed, plain = settings.load(words, steps=LONG, quiet=True)
    timed.trainer.samples_per_epoch = len(sources[0])
    _count_classes(timed, plain, sources[0])
    step = measure_step(timed, _stream(timed, sources, world), world, limit, _time_limit(config, started))
    count, length = int(limit / step.seconds), f"{1e3 * step.seconds:,.1f} ms"

    def fit() -> tuple[PretrainConfig, DictConfig]:
        if not count:
            raise settings.SettingsError(
                f"run.train_time={config.run.train_time}: no time for a step, which takes {length}; give more"
            )
        return settings.load(words, steps=count)

    fitted = _together(world, fit)
    if world.is_main:
        said = f"run.train_time={config.run.train_time}: {count:,} steps ({length} each, measured over {step.steps:,})"
        console.print(said, highlight=False)
    return fitted


def _prepare(
    config: PretrainConfig,
    plain: DictConfig,
    words: list[str],
    sources: Sources,
    world: World,
    folder: Path,
    console: Console,
    started: float,
    held: ExitStack,
) -> Trainer:
    _count_classes(config, plain, sources[0])
    # Drop path draws from the global generator; checkpoints carry it.
    torch.manual_seed(config.run.seed * world.size + world.rank)
    task = build_task(config)
    stream = _stream(config, sources, world)
    _together(world, lambda: _make_folder(folder, plain))
    _together(world, lambda: held.enter_context(claim(folder)) if world.is_main else None)
    callbacks = _together(world, lambda: _callbacks(config, plain, words, sources, folder, console, started))
    trainer = Trainer(
        task,
        stream,
        config.trainer,
        run_dir=folder,
        callbacks=callbacks,
        checkpoint=config.checkpoint,
        world=world,
        blocks=(Block,),
        metadata={"recipe": config.recipe, "model": config.model},
    )
    if world.is_main:
        _announce(config, task, len(sources[0]), folder, console)
    return trainer


def _stream(config: PretrainConfig, sources: Sources, world: World) -> DevicePrefetcher:
    if config.data.decode == Decode.GPU and world.device.type != "cuda":
        raise ValueError(f"data.decode=gpu: the run is on {world.device}; allowed: cpu, or a run on a CUDA device")
    stream = config.data.stream(config.trainer.accumulate, world.size).build(
        sources[0], seed=config.run.seed, rank=world.rank, world_size=world.size, device=world.device
    )
    return DevicePrefetcher(stream, world.device)


def _count_classes(config: PretrainConfig, plain: DictConfig, source: Source) -> None:
    """Fill in how many classes a supervised baseline has to tell apart."""
    if config.baseline is not None and config.baseline.kind is BaselineKind.supervised:
        found = int(source.labels.max()) + 1
        if config.baseline.num_classes is not None and config.baseline.num_classes < found:
            raise DataError(
                f"baseline.num_classes={config.baseline.num_classes}: labels of data.train go up to {found - 1}; "
                f"allowed: {found} and more, or null to count them"
            )
        config.baseline.num_classes = config.baseline.num_classes or (found if found > 1 else None)
        plain.baseline.num_classes = config.baseline.num_classes


def _name(config: PretrainConfig, world: World) -> Path:
    """Name the run's folder; processes that torchrun starts again go back to that of the first ones."""
    stamp = world.first("run", int(time.time()))
    name = f"{config.recipe}-{time.strftime('%Y%m%d-%H%M%S', time.localtime(stamp))}"
    return Path("runs") / name if config.run.dir is None else Path(config.run.dir)


def _make_folder(folder: Path, plain: DictConfig) -> None:
    """Make the run's folder, or go back to it."""
    plain.run.dir = str(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise settings.SettingsError(f"run.dir={folder}: cannot be made ({error.strerror}); choose another") from error
    if not (folder / settings.CONFIG_FILE).is_file():
        found = [folder / name for name in ("checkpoints", "metrics.jsonl", "config.json")]
        # A file without rows is left where another logger has refused.
        strange = [path.name for path in found if path.is_dir() or (path.is_file() and path.stat().st_size)]
        if strange:
            raise settings.SettingsError(
                f"run.dir={folder}: holds {', '.join(strange)} but no {settings.CONFIG_FILE}, so it is no run of this "
                "program; choose another folder"
            )
    elif (folder / RESULTS_FILE).is_file() and not any((folder / "checkpoints").glob("step_*")):
        raise settings.SettingsError(
            f"run.dir={folder}: a finished run without its checkpoints, which would begin again; choose another "
            f"folder, or remove its {RESULTS_FILE}"
        )


def _callbacks(
    config: PretrainConfig,
    plain: DictConfig,
    words: list[str],
    sources: Sources,
    folder: Path,
    console: Console,
    started: float,
) -> list[Callback]:
    # A logger that refuses leaves the run as it was.
    callbacks = build_loggers(config.loggers, folder, config.logger, settings.flat(plain))
    callbacks += [RunRecord(plain, words, folder), CollapseMonitor(config.monitor)]
    if config.eval.every_steps is not None:
        images = load_pair(config, sources, config.eval.online_samples, config.eval.online_samples)
        if images is not None:
            callbacks.append(Measure(config.eval.every_steps, OnlineEvaluation(config, *images)))
    callbacks += [SkippedImages(config.trainer.log_every, console), ProgressBar(console=console)]
    if config.early_stop is not None:
        callbacks.append(EarlyStop(config.early_stop))
    if config.profile:
        callbacks.append(Profiler(folder / "profile", config.profiler))
    return callbacks + _time_limit(config, started)


def _time_limit(config: PretrainConfig, started: float) -> list[Callback]:
    seconds = config.run.time_limit_seconds
    return [] if seconds is None else [TimeLimit(seconds / 60, started=started)]


@contextmanager
def _stopped_in_time(config: PretrainConfig, started: float) -> Iterator[None]:
    """Stop what no trainer does where `run.time_limit` has passed, as a signal would."""
    limit = config.run.time_limit_seconds
    if limit is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    remedy = "; if it ends here each time, give run.time_limit more, or eval.at_end=false"
    stop = partial(Stopped.by, f"run.time_limit={config.run.time_limit}", remedy)
    before = signal.signal(signal.SIGALRM, lambda *_: stop())
    try:
        left = started + limit - time.monotonic()
        if left <= 0.0:
            stop()
        signal.setitimer(signal.ITIMER_REAL, left)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def _announce(config: PretrainConfig, task: PretrainTask, images: int, folder: Path, console: Console) -> None:
    encoder = config.hjepa.encoder
    parameters = sum(parameter.numel() for parameter in task.model.encoder.parameters())
    grid = "x".join(map(str, encoder.grid))
    kind = "demo composites" if config.data.train is None else "images"
    console.print(
        Text(config.recipe, style="bold"),
        f": {config.model} ({parameters / 1e6:.2f} M parameters, {grid} patches, "
        f"{_levels(config)}) on {images:,} {kind}, "
        f"{config.run.steps:,} steps of {config.data.batch_size}",
        sep="",
        highlight=False,
    )
    console.print(f"run folder: {folder} (to go on after a stop: {command(folder)})", highlight=False)
    if config.data.train is not None and config.data.eval is None:
        logger.warning("data.eval: not given, so nothing is measured; give held-out images, with labels or without")


def _levels(config: PretrainConfig) -> str:
    if config.baseline is not None:
        return f"baseline {config.baseline.kind}"
    count = config.hjepa.pyramid.levels
    return f"{count} level{'s' if count > 1 else ''}{' and global' if config.hjepa.global_level else ''}"


def _finish(config: PretrainConfig, trainer: Trainer, sources: Sources, folder: Path, console: Console) -> None:
    """Write weights, report and results; a run that was finished before only shows its table."""
    results = measured_before(config, trainer.step, folder)
    if results is None or not all((folder / name).is_file() for name in _LEFT):
        from hjepa_pretrain.report import write_report

        model = _final_model(config, trainer)
        # Those of an earlier end are not of the weights that come now.
        (folder / RESULTS_FILE).unlink(missing_ok=True)
        save_model(model, folder)
        images = load_pair(config, sources, config.eval.train_samples, config.eval.eval_samples)
        measured: list[Measurement] = []
        if images is not None and config.eval.at_end:
            measured = measure(model, config, *images, trainer.world.device)
        results = results_of(measured, trainer.step, folder, config)
        write_report(folder, config, model, images, results)
        # The last file: a run that has it is finished.
        write_results(results, folder / RESULTS_FILE)
    if results.measurements:
        console.print(results_table(results, console.width))
    console.print(f"report: {folder / 'report.html'}", highlight=False)


def _final_model(config: PretrainConfig, trainer: Trainer) -> Model:
    """Read the last checkpoint into a model of this process, however it was sharded in training."""
    assert trainer.store is not None
    task = build_task(config)
    saved = trainer.store.at(trainer.step).tensors()
    task.load_state_dict({name.removeprefix("model/"): saved[name] for name in saved if name.startswith("model/")})
    return task.model.to(trainer.world.device)
