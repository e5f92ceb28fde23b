"""The loader beside the plainest loop that gives the same crops: same images, same cores, in turn."""

import io
import multiprocessing
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from hjepa_data import ShardSource, StreamConfig, ViewGroup, WorkerConfig

_BATCH = 50


@dataclass(frozen=True, kw_only=True, slots=True)
class LoaderSpeed:
    """Images a second of the two, median over repeats, and the median of their ratios pair by pair."""

    loader: float
    plain: float
    ratio: float


def measure_loader(source: ShardSource, *, size: int, workers: int, images: int, repeats: int) -> LoaderSpeed:
    """Times the training stream and the plain loop in turn.

    Args:
        source: the images.
        size: side of a crop, pixels.
        workers: processes of each of the two; 0 is the calling process.
        images: images of a measurement.
        repeats: measurements of each.
    """
    pairs = []
    for number in range(repeats):
        ours = _stream_speed(source, size, workers, images, number)
        pairs.append((ours, _plain_speed(source, size, workers, images, number)))
    return LoaderSpeed(
        loader=statistics.median(pair[0] for pair in pairs),
        plain=statistics.median(pair[1] for pair in pairs),
        ratio=statistics.median(ours / plain for ours, plain in pairs),
    )


def print_loader(shards: str, *, size: int, workers: int, images: int, repeats: int) -> None:
    """Measures and prints one line.

    Raises:
        ValueError: there are no such shards, or a number is out of range.
    """
    for name, value, least in (
        ("--size", size, 1),
        ("--workers", workers, 0),
        ("--images", images, _BATCH),
        ("--repeats", repeats, 1),
    ):
        if value < least:
            raise ValueError(f"{name}={value}: too small; allowed: {least} and more")
    found = measure_loader(ShardSource(shards), size=size, workers=workers, images=images, repeats=repeats)
    print(
        f"loader {found.loader:,.0f} images/s, plain decode + crop loop {found.plain:,.0f} images/s, "
        f"ratio {found.ratio:.2f} ({workers} workers, {size}x{size} crops, median of {repeats} x {images} images)"
    )


def _stream_speed(source: ShardSource, size: int, workers: int, images: int, seed: int) -> float:
    config = StreamConfig(
        global_batch_size=_BATCH, views=(ViewGroup(size=(size, size)),), workers=WorkerConfig(count=workers)
    )
    stream = config.build(source, seed=seed)
    for _ in range(max(1, 2 * workers)):
        next(stream)  # workers have started
    began = time.perf_counter()
    for _ in range(images // _BATCH):
        next(stream)
    elapsed = time.perf_counter() - began
    stream.close()
    return images // _BATCH * _BATCH / elapsed


def _plain_speed(source: ShardSource, size: int, workers: int, images: int, seed: int) -> float:
    chosen = np.random.default_rng(seed).integers(0, len(source), images).tolist()
    if not workers:
        began = time.perf_counter()
        _plain_loop((source, chosen, size, seed))
        return images / (time.perf_counter() - began)
    parts = [(source, chosen[number::workers], size, number) for number in range(workers)]
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        pool.map(_plain_loop, [(source, chosen[:2], size, 0)] * workers)  # processes have started
        began = time.perf_counter()
        pool.map(_plain_loop, parts, chunksize=1)
        return images / (time.perf_counter() - began)


def _plain_loop(work: tuple[ShardSource, Sequence[int], int, int]) -> int:
    """Read, decode, crop at random, resize and stack: what everybody writes first."""
    source, chosen, size, seed = work
    rng = np.random.default_rng(seed)
    batch = torch.empty((_BATCH, 3, size, size), dtype=torch.uint8)
    for row, number in enumerate(chosen):
        image = Image.open(io.BytesIO(source.read(number).image)).convert("RGB")
        area = image.width * image.height * rng.uniform(0.3, 1.0)
        aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        width = min(image.width, max(1, round((area * aspect) ** 0.5)))
        height = min(image.height, max(1, round((area / aspect) ** 0.5)))
        left, top = rng.integers(0, image.width - width + 1), rng.integers(0, image.height - height + 1)
        crop = image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + width, top + height))
        pixels = np.asarray(crop)[:, ::-1] if rng.random() < 0.5 else np.asarray(crop)
        batch[row % _BATCH] = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
    return len(chosen)
