"""Training steps a second: the whole step of the task, on synthetic images that are on the device already."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hjepa_data import Batch
from hjepa_pretrain import settings
from hjepa_pretrain.config import PretrainConfig
from hjepa_pretrain.task import build_task
from hjepa_train import EMA
from hjepa_train.precision import autocast

_WARMUP = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Throughput:
    """What a step takes.

    Attributes:
        images_per_second: images (not views) of one process.
        milliseconds: median length of a step, over groups with one masked step each.
        peak_gib: largest memory that torch held on the GPU, or None on a CPU.
    """

    images_per_second: float
    milliseconds: float
    peak_gib: float | None


def measure_throughput(config: PretrainConfig, *, steps: int) -> Throughput:
    """Times forward, backward, clipping, optimizer and EMA; the median step counts.

    Args:
        config: of the run to be measured; its last steps are those that are timed, when every level has its weight.
        steps: timed steps, after a few that are not.
    """
    cuda = config.run.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    task = build_task(config).to(device).train()
    optimizer = config.trainer.optimizer.build(task)
    ema = EMA(task.ema_pairs())
    parameters = [parameter for parameter in task.parameters() if parameter.requires_grad]
    batch = _synthetic(config, device)
    seconds = []
    every = config.hjepa.masked_every
    for number in range(_WARMUP + steps):
        if number == _WARMUP and cuda:
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        with autocast(config.trainer.precision, device):
            output = task(batch, config.run.steps - 1 - number % every)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.trainer.clip_norm or float("inf"))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(0.996)
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    # Groups of steps with one masked step each: what a step takes on average.
    timed = [statistics.mean(seconds[at : at + every]) for at in range(_WARMUP, len(seconds) - every + 1, every)]
    median = statistics.median(timed)
    return Throughput(
        images_per_second=len(batch) / median,
        milliseconds=1e3 * median,
        peak_gib=torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
    )


def print_throughput(words: Sequence[str], *, steps: int) -> None:
    """Measures the run that these settings describe and prints one line.

    Raises:
        ValueError: a setting is wrong, or there is no step to time.
    """
    config, _ = settings.load(words)
    if steps < config.hjepa.masked_every:
        raise ValueError(f"--steps={steps}: too few; allowed: hjepa.masked_every={config.hjepa.masked_every} and more")
    found = measure_throughput(config, steps=steps)
    memory = "" if found.peak_gib is None else f", {found.peak_gib:.1f} GiB"
    print(
        f"{config.recipe} {config.model} batch {config.data.batch_size} views {config.data.views} "
        f"{config.trainer.precision}: {found.images_per_second:,.0f} images/s, {found.milliseconds:.1f} ms a step"
        f"{memory} (median of {steps})"
    )


def _synthetic(config: PretrainConfig, device: torch.device) -> Batch:
    generator = torch.Generator().manual_seed(0)
    count, channels = config.data.batch_size, config.hjepa.encoder.in_channels
    shape = (count, channels, *config.data.image_size)
    views = tuple(
        torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) for _ in range(config.data.views)
    )
    return Batch(
        views=views,
        labels=torch.full((count,), -1),
        sample=torch.arange(count),
        epoch=torch.zeros(count, dtype=torch.int64),
    ).to(device)
