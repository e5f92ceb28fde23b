"""A run from its configuration to its folder: data, task, trainer, results, report."""

import logging
import time
from pathlib import Path

import torch
import torch.distributed as dist
from omegaconf import DictConfig
from rich.console import Console

from hjepa_data import DataError, ShardSource
from hjepa_models import HJEPA, save_pretrained
from hjepa_pretrain import settings
from hjepa_pretrain.config import PretrainConfig
from hjepa_pretrain.evaluation import (
    Images,
    OnlineEvaluation,
    load_run_images,
    measure,
    open_sources,
    read_results,
    results_table,
    save_results,
)
from hjepa_pretrain.provenance import provenance
from hjepa_pretrain.report import write_report
from hjepa_pretrain.task import PretrainTask, build_task
from hjepa_train import (
    Callback,
    CollapseMonitor,
    MetricsLog,
    Outcome,
    Profiler,
    ProgressBar,
    StepResult,
    TensorBoardLog,
    TimeLimit,
    Trainer,
    World,
    init_world,
    leave_world,
)

logger = logging.getLogger(__name__)


class SkippedImages(Callback):
    """Logs `data/skipped`, the images left out since the run was started, and says why at the end."""

    def __init__(self, every: int, console: Console) -> None:
        self._every = every
        self._console = console

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        """Count over all ranks, where a row is written."""
        if trainer.step % self._every == 0 or trainer.step == trainer.config.steps:
            skipped: dict[str, int] = trainer.stream.skipped  # type: ignore[attr-defined]
            total = trainer.world.sum(torch.tensor(sum(skipped.values()), device=trainer.world.device))
            if int(total):
                trainer.log({"data/skipped": float(total)})

    def on_fit_end(self, trainer: Trainer, outcome: Outcome | None) -> None:
        """Say what was left out."""
        skipped: dict[str, int] = trainer.stream.skipped  # type: ignore[attr-defined]
        if skipped and trainer.world.is_main:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()))
            self._console.print(f"left out: {reasons}", highlight=False)


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
    world = init_world(config.trainer.parallel)
    try:
        outcome, trainer, images, folder = _train(config, plain, words, world, console, started)
    finally:
        leave_world()
    if outcome is Outcome.DONE and world.is_main:
        _finish(config, trainer, images, folder, console)
    return outcome


def _train(
    config: PretrainConfig, plain: DictConfig, words: list[str], world: World, console: Console, started: float
) -> tuple[Outcome, Trainer, tuple[Images, Images] | None, Path]:
    source = _train_source(config, world)
    task = build_task(config)
    stream = config.data.stream(config.trainer.accumulate).build(
        source, seed=config.run.seed, rank=world.rank, world_size=world.size
    )
    images = load_run_images(config) if config.eval.at_end or config.eval.every_steps else None
    folder = _folder(config, plain, words, world, console)
    trainer = Trainer(
        task,
        stream,
        config.trainer,
        run_dir=folder,
        callbacks=_callbacks(config, images, folder, console, started),
        checkpoint=config.checkpoint,
        world=world,
        blocks=_blocks(),
        metadata={"recipe": config.recipe, "model": config.model},
    )
    if world.is_main:
        _announce(config, task, len(source), folder, console)
    return trainer.fit(), trainer, images, folder


def _train_source(config: PretrainConfig, world: World) -> ShardSource:
    """Open the training shards; the demo's are made by the main rank, the others wait for them."""
    if config.data.train is None and world.size > 1:
        if world.is_main:
            open_sources(config)
        dist.barrier()
    source, _ = open_sources(config)
    if len(source) < config.data.batch_size:
        raise DataError(
            f"data.train={config.data.train}: holds {len(source)} images, less than one batch of data.batch_size="
            f"{config.data.batch_size}; lower the batch or give more shards"
        )
    return source


def _folder(config: PretrainConfig, plain: DictConfig, words: list[str], world: World, console: Console) -> Path:
    """Make the run's folder with its configuration, or go back to it; the main rank names it for all."""
    stamp = world.from_main(int(time.time()))
    name = f"{config.recipe}-{time.strftime('%Y%m%d-%H%M%S', time.localtime(stamp))}"
    folder = Path("runs") / name if config.run.dir is None else Path(config.run.dir)
    plain.run.dir = str(folder)
    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        origin = settings.read_provenance(folder) or provenance(words)
        settings.save(plain, origin, folder)
    return folder


def _callbacks(
    config: PretrainConfig, images: tuple[Images, Images] | None, folder: Path, console: Console, started: float
) -> list[Callback]:
    callbacks: list[Callback] = [CollapseMonitor(config.monitor)]
    if images is not None and config.eval.every_steps is not None:
        callbacks.append(OnlineEvaluation(config, *(each.head(config.eval.online_samples) for each in images)))
    callbacks += [
        SkippedImages(config.trainer.log_every, console),
        MetricsLog(folder / "metrics.jsonl"),
        TensorBoardLog(folder),
        ProgressBar(console=console),
    ]
    if config.profiler is not None:
        callbacks.append(Profiler(folder / "profile", config.profiler))
    if config.run.time_limit_seconds is not None:
        callbacks.append(TimeLimit(config.run.time_limit_seconds / 60, started=started))
    return callbacks


def _blocks() -> tuple[type[torch.nn.Module], ...]:
    from hjepa_models.layers.block import Block

    return (Block,)


def _announce(config: PretrainConfig, task: PretrainTask, images: int, folder: Path, console: Console) -> None:
    encoder = config.hjepa.encoder
    parameters = sum(parameter.numel() for parameter in task.model.encoder.parameters())
    grid = "x".join(map(str, encoder.grid))
    kind = "demo composites" if config.data.train is None else "images"
    console.print(
        f"[bold]{config.recipe}[/]: {config.model} ({parameters / 1e6:.2f} M parameters, {grid} patches, "
        f"{config.hjepa.pyramid.levels} level{'s' if config.hjepa.pyramid.levels > 1 else ''}"
        f"{' and global' if config.hjepa.global_level else ''}) on {images:,} {kind}, "
        f"{config.run.steps:,} steps of {config.data.batch_size}",
        highlight=False,
    )
    console.print(f"run folder: {folder} (to go on after a stop: hjepa-pretrain run.dir={folder})", highlight=False)


def _finish(
    config: PretrainConfig, trainer: Trainer, images: tuple[Images, Images] | None, folder: Path, console: Console
) -> None:
    """Write weights, results and report; a run that was finished before only shows its table."""
    results = read_results(folder, trainer.step)
    if results is None or not (folder / "model.safetensors").is_file():
        model = _final_model(config, trainer)
        save_pretrained(model, folder)
        if images is not None and config.eval.at_end:
            results = save_results(measure(model, config, *images, trainer.world.device), trainer.step, folder)
        write_report(folder, config, model, images, results)
    if results is not None:
        console.print(results_table(results))
    console.print(f"report: {folder / 'report.html'}", highlight=False)


def _final_model(config: PretrainConfig, trainer: Trainer) -> HJEPA:
    """Read the last checkpoint into a model of this process, however it was sharded in training."""
    assert trainer.store is not None
    task = build_task(config)
    saved = trainer.store.at(trainer.step).tensors()
    task.load_state_dict({name.removeprefix("model/"): saved[name] for name in saved if name.startswith("model/")})
    return task.model.to(trainer.world.device)
