"""Before a run: its schedules drawn, and a learning rate looked for."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from hjepa_models import Block
from hjepa_models.config import WITHOUT_EMA
from hjepa_pretrain.config import PlanConfig, PretrainConfig
from hjepa_pretrain.report import figures
from hjepa_pretrain.settings import SettingsError
from hjepa_pretrain.task import PretrainTask
from hjepa_pretrain.uncut import uncut
from hjepa_train import Callback, ProgressBar, RateSweep, ScheduleConfig, ScheduleUnit, Stream, World, find_rate

SCHEDULES_FILE, RATES_FILE = "schedules.png", "learning_rate.png"
_POINTS = 1_000


def schedules(config: PretrainConfig, steps: NDArray[np.int64]) -> dict[str, dict[str, NDArray[np.float64]]]:
    """Return what a run schedules, by title and by line, at the given steps.

    Args:
        config: of the run.
        steps: optimizer steps done, [n].
    """
    trainer, hjepa = config.trainer, config.hjepa

    def values(schedule: ScheduleConfig) -> NDArray[np.float64]:
        return schedule.values(steps, trainer.length)

    found = {
        "learning rate": {"learning rate": values(trainer.learning_rate)},
        "weight decay": {"weight decay": values(trainer.weight_decay)},
    }
    if config.baseline is not None:
        return found
    if hjepa.targets not in WITHOUT_EMA:
        found["EMA momentum"] = {"EMA momentum": values(trainer.ema_momentum)}
    weights = np.array([hjepa.level_weights.level_weights(int(step)) for step in steps])
    found[f"level weights ({hjepa.level_weights.kind})"] = {
        f"level {level} weight": weights[:, level] for level in range(weights.shape[1])
    }
    if hjepa.patch_schedule is not None:
        sizes = [float(hjepa.patch_schedule.patch_size(int(step))) for step in steps]
        found["patch size, pixels"] = {"patch size": np.array(sizes)}
    return found


def show_schedules(config: PretrainConfig, console: Console) -> None:
    """Print the schedules of a run as a table, and draw them into `<plan.dir>/schedules.png`."""
    last = config.run.steps - 1
    marks = sorted({0, config.trainer.length.to_steps(*_warmup(config)), *(last * part // 4 for part in range(1, 5))})
    shown = np.array([step for step in marks if step <= last])
    table = Table(
        title="Schedules by step", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    table.add_column("", no_wrap=True)
    for step in shown:
        table.add_column(f"{step:,}", justify="right", no_wrap=True)
    for lines in schedules(config, shown).values():
        for name, numbers in lines.items():
            table.add_row(name, *(f"{number:.3g}" for number in numbers))
    console.print(uncut(table))
    steps = np.unique(np.linspace(0, last, min(_POINTS, config.run.steps)).round().astype(np.int64))
    drawn = schedules(config, steps)
    figure, all_axes = plt.subplots(len(drawn), 1, figsize=(6.4, 1.7 * len(drawn)), sharex=True, squeeze=False)
    for axes, (title, lines) in zip(all_axes[:, 0], drawn.items(), strict=True):
        for color, (name, numbers) in zip(figures.COLORS * 4, lines.items(), strict=False):
            axes.plot(steps, numbers, color=color, linewidth=1.6, label=name)
        axes.set_title(title, fontsize=9, loc="left")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if len(lines) > 1:
            axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    all_axes[-1, 0].set_xlabel("optimizer step")
    figure.tight_layout()
    _write(config.plan, SCHEDULES_FILE, figures.png(figure), console)


def find_learning_rate(
    config: PretrainConfig,
    task: PretrainTask,
    stream: Stream,
    world: World,
    console: Console,
    callbacks: Sequence[Callback] = (),
) -> RateSweep:
    """Sweep the learning rate on the real task, draw the loss into `<plan.dir>/learning_rate.png`, suggest a rate.

    Args:
        config: of the run; nothing of it is saved.
        task: trained by the sweep, and worth nothing afterwards.
        stream: likewise.
        world: this process among the others.
        console: where the suggestion goes.
        callbacks: that may ask for a stop.

    Raises:
        SweepStoppedError: a signal or a callback asked for it.
    """
    plan, cycle = config.plan, task.cycle
    sweep = find_rate(
        task,
        stream,
        config.trainer,
        low=plan.find_lr_low,
        high=plan.find_lr_high,
        steps=plan.find_lr_steps,
        # The last step of the run that predicts, with all the levels that it ever has.
        place=cycle * max(1, config.run.steps // cycle) - 1,
        world=world,
        blocks=(Block,),
        callbacks=[ProgressBar(console=console), *callbacks],
    )
    if not world.is_main:
        return sweep
    if not len(sweep.rates):
        raise SettingsError(f"plan.find_lr_low={plan.find_lr_low}: the loss is not finite at once; check the data")
    figure, axes = plt.subplots(figsize=(6.4, 3.2))
    axes.plot(sweep.rates, sweep.losses, color=figures.COLORS[0], alpha=0.3, linewidth=0.8)
    axes.plot(sweep.rates, sweep.smoothed, color=figures.COLORS[0], linewidth=1.6, label="loss, smoothed")
    if sweep.suggestion is not None:
        axes.axvline(sweep.suggestion, color=figures.COLORS[1], label=f"suggested: {sweep.suggestion:.2g}")
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss")
    figures.legend(axes)
    axes.spines[["top", "right"]].set_visible(False)
    _write(plan, RATES_FILE, figures.png(figure), console)
    console.print(_advice(sweep), highlight=False)
    return sweep


def _advice(sweep: RateSweep) -> str:
    if sweep.suggestion is None:
        return "no suggestion: the loss did not fall; raise plan.find_lr_steps or widen plan.find_lr_low and _high"
    least, last = float(sweep.rates[sweep.smoothed.argmin()]), float(sweep.rates[-1])
    return (
        f"trainer.learning_rate.value={sweep.suggestion:.2g}: the loss falls fastest there; it is least at {least:.2g} "
        f"and the sweep ended at {last:.2g}. The loss of a JEPA is no measure of quality: take it as an order of "
        "magnitude"
    )


def _warmup(config: PretrainConfig) -> tuple[int, ScheduleUnit]:
    return config.trainer.learning_rate.warmup_steps, config.trainer.learning_rate.unit


def _write(plan: PlanConfig, name: str, picture: bytes, console: Console) -> None:
    path = Path(plan.dir) / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture)
    except OSError as error:
        raise SettingsError(f"plan.dir={plan.dir}: {path.name} cannot be written ({error.strerror})") from error
    console.print(f"drawn: {path}", highlight=False)
