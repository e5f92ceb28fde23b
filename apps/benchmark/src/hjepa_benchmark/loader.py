"""The loader beside the loops and loaders that people have: same images, same crops, same cores, in turn."""

import json
import os
import statistics
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from hjepa_benchmark.rivals import BATCH, Setup, all_loaders
from hjepa_data import ShardSource
from hjepa_pretrain.uncut import uncut


@dataclass(frozen=True, kw_only=True, slots=True)
class LoaderSpeed:
    """Images a second of one loader.

    Attributes:
        loader: its name.
        speeds: of each repeat.
        median: of the speeds.
        ratio: our speed / its speed, median over the repeats: of two measurements that followed each other.
    """

    loader: str
    speeds: list[float]
    median: float
    ratio: float


def measure_loaders(setup: Setup, *, repeats: int) -> list[LoaderSpeed]:
    """Times all loaders in turn, again and again; ours is the first.

    Args:
        setup: what they load.
        repeats: measurements of each.
    """
    loaders = all_loaders(setup)
    speeds: dict[str, list[float]] = {name: [] for name in loaders}
    for repeat in range(repeats):
        for name, measure in loaders.items():
            speeds[name].append(measure(repeat))
    ours = next(iter(speeds.values()))
    return [
        LoaderSpeed(
            loader=name,
            speeds=found,
            median=statistics.median(found),
            ratio=statistics.median(one / other for one, other in zip(ours, found, strict=True)),
        )
        for name, found in speeds.items()
    ]


def print_loader(
    shards: str, *, size: int, workers: int, images: int, repeats: int, output: Path | None = None
) -> None:
    """Measures, prints a table and writes the numbers to a file if there is one.

    Raises:
        ValueError: there are no such shards, or a number is out of range.
    """
    for name, value, least in (
        ("--size", size, 1),
        ("--workers", workers, 0),
        ("--images", images, BATCH),
        ("--repeats", repeats, 1),
    ):
        if value < least:
            raise ValueError(f"{name}={value}: too small; allowed: {least} and more")
    source = ShardSource(shards)
    with tempfile.TemporaryDirectory(prefix="hjepa-benchmark-") as folder:
        setup = Setup(source=source, folder=Path(folder), size=size, workers=workers, images=images)
        rows = measure_loaders(setup, repeats=repeats)
    table = Table(title=f"{size}x{size} crops, {workers} workers, {repeats} x {images} images, {os.cpu_count()} cores")
    table.add_column("loader")
    for title in ("images/s (median)", "lowest", "highest", "ours / it"):
        table.add_column(title, justify="right")
    for row in rows:
        speeds = (row.median, min(row.speeds), max(row.speeds))
        table.add_row(row.loader, *(f"{speed:,.0f}" for speed in speeds), f"{row.ratio:.2f}")
    Console(soft_wrap=True).print(uncut(table))
    if output is not None:
        found = {
            "size": size,
            "workers": workers,
            "images": images,
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "rows": [asdict(row) for row in rows],
        }
        output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
