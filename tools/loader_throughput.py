"""Compare hjepa-data's loader with plain loops of Pillow: the same images, crops of the same law, the same cores.

    python tools/loader_throughput.py FOLDER_OR_SHARDS [--size 224] [--workers 0 2] [--seconds 8]

The plain loop opens each image from memory, decodes all of it to RGB, draws a random-resized crop and a flip with the
generator of Python, resizes, and lays 256 results into one uint8 array: no shards, no order, no state. With N workers
it runs N times, in N processes that send nothing anywhere. The two take turns, best of three, after a first batch of
the loader that warms the page cache.
"""

from __future__ import annotations

import argparse
import io
import math
import multiprocessing
import random
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from hjepa_data import ShardSource, StreamConfig, ViewGroup, WorkerConfig, write_shards

BATCH = 256
ROUNDS = 3
SCALE, RATIO = (0.3, 1.0), (3 / 4, 4 / 3)


def plain_crop(data: bytes, size: int, rng: random.Random) -> np.ndarray:
    """Decode, crop, resize and flip one image, as simply as it can be written."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    width, height = image.size
    for _ in range(10):
        area = width * height * rng.uniform(*SCALE)
        aspect = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            break
    else:
        w = h = min(width, height)
    left, top = rng.randint(0, width - w), rng.randint(0, height - h)
    image = image.crop((left, top, left + w, top + h)).resize((size, size), Image.Resampling.BILINEAR)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(image).transpose(2, 0, 1)


def plain_loop(images: list[bytes], size: int, seconds: float) -> float:
    """Images a second of the plain loop in this process."""
    rng = random.Random(0)
    done, begin = 0, time.perf_counter()
    out = np.empty((BATCH, 3, size, size), dtype=np.uint8)
    while (passed := time.perf_counter() - begin) < seconds:
        for _ in range(16):
            out[done % BATCH] = plain_crop(images[rng.randrange(len(images))], size, rng)
            done += 1
    return done / passed


def plain_processes(images: list[bytes], size: int, seconds: float, processes: int) -> float:
    """Images a second of plain loops in several processes together."""
    if processes == 0:
        return plain_loop(images, size, seconds)
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        return sum(pool.starmap(plain_loop, [(images, size, seconds)] * processes))


def loader(source: ShardSource, size: int, seconds: float, workers: int) -> float:
    """Images a second of the loader, in batches that arrive in this process."""
    config = StreamConfig(
        global_batch_size=BATCH,
        views=(ViewGroup(size=(size, size), scale=SCALE, ratio=RATIO),),
        workers=WorkerConfig(count=workers),
    )
    stream = config.build(source, seed=0)
    # Not the start of the workers, and not the batches that they prepare during it.
    for _ in range(max(1, 2 * workers)):
        next(stream)
    batches, begin = 0, time.perf_counter()
    while (passed := time.perf_counter() - begin) < seconds:
        next(stream)
        batches += 1
    stream.close()
    return batches * BATCH / passed


def open_source(data: str, folder: str) -> ShardSource:
    """Read shards, or make some of a folder of images."""
    path = Path(data)
    if path.is_dir() and not list(path.glob("*.tar")):
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in {".jpg", ".jpeg", ".png"})[:20_000]
        write_shards((file.read_bytes() for file in files), folder, samples_per_shard=max(1, len(files) // 8))
        return ShardSource(folder)
    return ShardSource(data)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="a folder of images, or shards")
    parser.add_argument("--size", type=int, default=224, help="side of the crops (224)")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="numbers of workers (0 2)")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each of the rounds (8)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        source = open_source(options.data, folder)
        images = [source.read(number).image for number in range(min(len(source), 5000))]
        mean = sum(map(len, images)) / len(images) / 1000
        print(
            f"{len(source):,} images, {mean:.1f} KB each, crops {options.size}x{options.size}, best of {ROUNDS} rounds"
        )
        print(f"{'workers':>8} {'plain loop':>12} {'hjepa-data':>12} {'ratio':>7}")
        for workers in options.workers:
            loader(source, options.size, 0.0, workers)
            plain, ours = [], []
            for _ in range(ROUNDS):
                plain.append(plain_processes(images, options.size, options.seconds, workers))
                ours.append(loader(source, options.size, options.seconds, workers))
            print(f"{workers:8} {max(plain):10.0f}/s {max(ours):10.0f}/s {max(ours) / max(plain):7.2f}", flush=True)


if __name__ == "__main__":
    main()
