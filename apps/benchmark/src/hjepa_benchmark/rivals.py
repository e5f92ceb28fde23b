"""What the loader is compared with: the loops and loaders that people have, with the same crops of the same images."""

import importlib.util
import io
import itertools
import math
import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, RandomSampler

from hjepa_data import Decode, DevicePrefetcher, ShardSource, StreamConfig, ViewGroup, WorkerConfig
from hjepa_data.shards.write import image_extension

BATCH = 50
SCALE, RATIO, FLIP = (0.3, 1.0), (3 / 4, 4 / 3), 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """What every loader is given.

    Attributes:
        source: the images.
        folder: for copies of the images in other forms.
        size: side of a crop, pixels.
        workers: processes of a loader; 0 is the calling process.
        images: images of a measurement.
    """

    source: ShardSource
    folder: Path
    size: int
    workers: int
    images: int

    @property
    def warm_batches(self) -> int:
        """Batches before the clock starts: by then all workers have started and hold what they prepare ahead."""
        return max(1, 3 * self.workers)


Measure = Callable[[int], float]


def all_loaders(setup: Setup) -> dict[str, Measure]:
    """Names each loader and what measures its images a second, given the number of the repeat; ours is the first."""
    loaders: dict[str, Measure] = {
        "hjepa-data": partial(_time_stream, setup),
        **({"hjepa-data, nvJPEG": partial(_time_gpu_stream, setup)} if torch.cuda.is_available() else {}),
        "plain loop, Pillow": partial(_time_loop, setup, _pillow_crop),
        "plain loop, torchvision": partial(_time_loop, setup, _torchvision_crop),
        "ImageFolder + DataLoader": partial(_time_image_folder, setup, _write_folder(setup)),
        "webdataset.WebLoader": partial(_time_webdataset, setup),
    }
    if importlib.util.find_spec("litdata") is not None:
        loaders["litdata"] = partial(_time_litdata, setup, _write_litdata(setup))
    return loaders


def _timed(setup: Setup, batches: Iterator[Any]) -> float:
    for _ in range(setup.warm_batches):
        next(batches)
    count = setup.images // BATCH
    began = time.perf_counter()
    for _ in range(count):
        next(batches)
    return count * BATCH / (time.perf_counter() - began)


def _time_stream(setup: Setup, repeat: int) -> float:
    stream = _stream_config(setup, Decode.CPU).build(setup.source, seed=repeat)
    speed = _timed(setup, stream)
    stream.close()
    return speed


def _time_gpu_stream(setup: Setup, repeat: int) -> float:
    """Times batches that lie on the GPU, ready to be used there."""
    stream = DevicePrefetcher(_stream_config(setup, Decode.GPU).build(setup.source, seed=repeat), "cuda")
    speed = _timed(setup, _waited_for(stream))
    stream.close()
    return speed


def _waited_for(batches: Iterator[Any]) -> Iterator[Any]:
    for batch in batches:
        torch.cuda.current_stream().synchronize()
        yield batch


def _stream_config(setup: Setup, decode: Decode) -> StreamConfig:
    return StreamConfig(
        global_batch_size=BATCH,
        views=(ViewGroup(size=(setup.size, setup.size), scale=SCALE, ratio=RATIO, flip=FLIP),),
        workers=WorkerConfig(count=setup.workers),
        decode=decode,
    )


# The plainest loops: read, decode, crop at random, resize and stack, with no loader around them.


def _time_loop(setup: Setup, crop: Callable[..., torch.Tensor], repeat: int) -> float:
    chosen = np.random.default_rng(repeat).integers(0, len(setup.source), setup.images).tolist()
    if not setup.workers:
        began = time.perf_counter()
        _loop((setup.source, chosen, setup.size, repeat, crop))
        return setup.images / (time.perf_counter() - began)
    parts = [(setup.source, chosen[n :: setup.workers], setup.size, n, crop) for n in range(setup.workers)]
    with multiprocessing.get_context("fork").Pool(setup.workers) as pool:
        # Processes have started.
        pool.map(_loop, [(setup.source, chosen[:2], setup.size, 0, crop)] * setup.workers, chunksize=1)
        began = time.perf_counter()
        pool.map(_loop, parts, chunksize=1)
        return setup.images / (time.perf_counter() - began)


def _loop(work: tuple[ShardSource, Sequence[int], int, int, Callable[..., torch.Tensor]]) -> int:
    source, chosen, size, seed, crop = work
    torch.set_num_threads(1)
    rng = np.random.default_rng(seed)
    batch = torch.empty((BATCH, 3, size, size), dtype=torch.uint8)
    with warnings.catch_warnings():
        # torchvision's decoders announce that they will move to another package.
        warnings.simplefilter("ignore", DeprecationWarning)
        for row, number in enumerate(chosen):
            batch[row % BATCH] = crop(_bytes(source, number), size, rng)
    return len(chosen)


def _box(width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    area = width * height * rng.uniform(*SCALE)
    aspect = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
    w, h = min(width, max(1, round((area * aspect) ** 0.5))), min(height, max(1, round((area / aspect) ** 0.5)))
    return int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1)), w, h


def _pillow_crop(data: bytes, size: int, rng: np.random.Generator) -> torch.Tensor:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    left, top, width, height = _box(image.width, image.height, rng)
    crop = image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + width, top + height))
    pixels = np.asarray(crop)[:, ::-1] if rng.random() < FLIP else np.asarray(crop)
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def _torchvision_crop(data: bytes, size: int, rng: np.random.Generator) -> torch.Tensor:
    from torchvision.io import ImageReadMode, decode_image  # type: ignore[import-untyped, unused-ignore]
    from torchvision.transforms.v2.functional import resized_crop  # type: ignore[import-untyped, unused-ignore]

    image = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
    left, top, width, height = _box(image.shape[2], image.shape[1], rng)
    crop: torch.Tensor = resized_crop(image, top, left, height, width, [size, size], antialias=True)
    return crop.flip(2) if rng.random() < FLIP else crop


# Loaders with torchvision's transforms, bytes to the end as ours.


def _transform(size: int) -> Callable[[Image.Image], torch.Tensor]:
    from torchvision.transforms import v2  # type: ignore[import-untyped, unused-ignore]

    crop = v2.RandomResizedCrop(size, scale=SCALE, ratio=RATIO, antialias=True)
    composed: Callable[[Image.Image], torch.Tensor] = v2.Compose(
        [crop, v2.RandomHorizontalFlip(FLIP), v2.PILToTensor()]
    )
    return composed


def _write_folder(setup: Setup) -> Path:
    folder = setup.folder / "images"
    for number in range(len(setup.source)):
        data = _bytes(setup.source, number)
        place = folder / str(max(0, setup.source.labels[number]))
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:08d}.{image_extension(data)}").write_bytes(data)
    return folder


def _bytes(source: ShardSource, number: int) -> bytes:
    data = source.read(number).image
    assert isinstance(data, bytes)
    return data


def _time_image_folder(setup: Setup, folder: Path, repeat: int) -> float:
    from torchvision.datasets import ImageFolder  # type: ignore[import-untyped, unused-ignore]

    dataset = ImageFolder(str(folder), _transform(setup.size))
    total = setup.images + setup.warm_batches * BATCH
    order = RandomSampler(dataset, replacement=True, num_samples=total, generator=torch.Generator().manual_seed(repeat))
    return _timed(setup, iter(DataLoader(dataset, batch_size=BATCH, sampler=order, num_workers=setup.workers)))


def _time_webdataset(setup: Setup, repeat: int) -> float:
    import webdataset

    dataset = (
        webdataset.WebDataset([str(shard) for shard in setup.source.shards], resampled=True, shardshuffle=False)
        .shuffle(1000)
        .decode("pilrgb")
        .to_tuple("jpg;png;webp")
        .map_tuple(_transform(setup.size))
        .batched(BATCH, partial=False)
    )
    return _timed(setup, iter(webdataset.WebLoader(dataset, batch_size=None, num_workers=setup.workers)))


def _write_litdata(setup: Setup) -> Path:
    folder = setup.folder / "litdata"
    # In a process of its own: it changes how all processes are started.
    writer = multiprocessing.get_context("fork").Process(target=_optimize, args=(setup, folder))
    writer.start()
    writer.join()
    return folder


def _optimize(setup: Setup, folder: Path) -> None:
    import litdata  # type: ignore[import-not-found, unused-ignore]

    total = setup.images + setup.warm_batches * BATCH
    numbers = list(itertools.islice(itertools.cycle(range(len(setup.source))), total))
    litdata.optimize(
        fn=partial(_read, setup.source),
        inputs=numbers,
        output_dir=str(folder),
        chunk_bytes="64MB",
        num_workers=1,
        start_method="fork",
    )


def _read(source: ShardSource, number: int) -> dict[str, Any]:
    return {"image": _bytes(source, number)}


def _time_litdata(setup: Setup, folder: Path, repeat: int) -> float:
    import litdata

    crop = partial(_decode_crop, _transform(setup.size))
    dataset = litdata.StreamingDataset(str(folder), shuffle=True, seed=repeat, transform=crop)
    return _timed(setup, iter(litdata.StreamingDataLoader(dataset, batch_size=BATCH, num_workers=setup.workers)))


def _decode_crop(transform: Callable[[Image.Image], torch.Tensor], sample: dict[str, Any]) -> torch.Tensor:
    return transform(Image.open(io.BytesIO(sample["image"])).convert("RGB"))
