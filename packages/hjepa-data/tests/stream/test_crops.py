"""Where each view was cut: what a batch says of it is what its pixels show, on every path of the stream."""

import io
import itertools

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from hjepa_data import ShardSource, StreamConfig, ViewGroup, WorkerConfig, write_shards

TOTAL, BATCH, SEED = 36, 6, 11
# No box is twice as large as its view, so that JPEGs are decoded at full scale.
VIEWS = (ViewGroup(count=2, size=(56, 64)), ViewGroup(size=(48, 48), scale=(0.1, 0.4), interpolation="bicubic"))
RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
GROUPS = [group for group in VIEWS for _ in range(group.count)]


def encoded(number):
    """Images of all sizes, half of them wide: PNGs, JPEGs, and JPEGs that are stored turned."""
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8))
    size = (70 + number, 100) if number % 2 else (104, 66 + number)
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = number % 8 + 1 if number % 3 == 0 else 1
    image = coarse.resize(size, Image.Resampling.BICUBIC)
    image.save(buffer, format="PNG" if number % 3 == 1 else "JPEG", quality=90, exif=exif.tobytes())
    return buffer.getvalue()


def cut(data, group, crop):
    """The oracle: the box, cut out of the upright image by Pillow, resized and mirrored."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    *box, mirrored = crop.double().tolist()
    left, top, width, height = (part * side for part, side in zip(box, image.size * 2, strict=True))
    edges = [left, top, left + width, top + height]
    assert np.allclose(edges, np.round(edges), rtol=0, atol=1e-4)
    assert mirrored in {0, 1}
    crop = image.crop([round(edge) for edge in edges])
    pixels = np.asarray(crop.resize(group.size[::-1], RESAMPLING[group.interpolation])).transpose(2, 0, 1)
    return pixels[:, :, ::-1] if mirrored else pixels


def build(source, workers=0, **fields):
    layout = {name: fields.pop(name) for name in ("rank", "world_size", "device") if name in fields}
    config = StreamConfig(
        global_batch_size=BATCH, window_shards=2, views=VIEWS, workers=WorkerConfig(count=workers), **fields
    )
    return config.build(source, seed=SEED, **layout)


def take(stream, count=14):
    found = list(itertools.islice(stream, count))
    stream.close()
    return found


def same(one, two):
    return all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(one.numbers, two.numbers, strict=True))


def check(source, batches):
    """Compare each view with the oracle; say which part of them is mirrored."""
    mirrored = []
    for batch in batches:
        assert [(crop.dtype, tuple(crop.shape)) for crop in batch.crops] == [(torch.float32, (len(batch), 5))] * 3
        for row, number in enumerate(batch.sample.tolist()):
            data = source.read(number).image
            for group, view, crop in zip(GROUPS, batch.views, batch.crops, strict=True):
                far = np.abs(view[row].cpu().numpy().astype(int) - cut(data, group, crop[row]))
                # Pillow and torch round at other places; nvJPEG interpolates colours in its own way.
                assert far.mean() < 4 if view.is_cuda else far.max() <= 2, (number, crop[row])
                mirrored.append(bool(crop[row, 4]))
    return sum(mirrored) / len(mirrored)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return ShardSource(write_shards([encoded(n) for n in range(TOTAL)], tmp_path_factory.mktemp("crops")))


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """Every sixth image is cut off, which shows late, or has no table, which only a decoder finds."""
    images = [encoded(n) for n in range(TOTAL)]
    for number in range(2, TOTAL, 6):
        table = images[number].index(b"\xff\xc4") + 5
        images[number] = (
            images[number][:-300] if number % 4 else images[number][:table] + bytes([255] * 16) + images[number][table:]
        )
    return ShardSource(write_shards(images, tmp_path_factory.mktemp("damaged")))


@pytest.fixture(scope="module")
def reference(source):
    return take(build(source))


def test_the_box_cut_out_of_the_upright_image_is_the_view(source, reference):
    assert 0.4 < check(source, reference) < 0.6


def test_the_oracle_tells_boxes_and_mirrors_apart(source, reference):
    """Of the numbers of another view, or with the flips the other way round, no view is as near."""
    batch = reference[0]
    mirrored = batch.crops[0].clone()
    mirrored[:, 4] = 1 - mirrored[:, 4]
    for row, number in enumerate(batch.sample.tolist()):
        data, view = source.read(number).image, batch.views[0][row].numpy().astype(int)
        for crop in (batch.crops[1], batch.crops[0].roll(1, 0), mirrored):
            try:
                far = np.abs(view - cut(data, GROUPS[0], crop[row])).mean()
            except AssertionError:
                # Parts of the sides of an image of another size.
                continue
            assert far > 5


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_change_a_bit(source, reference, workers):
    # Batches that are all held fill the pool, and the last ones travel without it.
    batches = take(build(source, workers))
    assert all(same(*pair) for pair in zip(batches, reference, strict=True))
    check(source, batches[-1:])


def test_a_cache_of_decoded_images_does_not_change_a_bit(source, reference):
    assert all(same(*pair) for pair in zip(take(build(source, cache_bytes=10**8)), reference, strict=True))


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_same_crops(source, reference, world):
    ranks = [take(build(source, rank=rank, world_size=world)) for rank in range(world)]
    for whole, *parts in zip(reference, *ranks, strict=True):
        for view, crop in enumerate(whole.crops):
            assert torch.equal(crop, torch.cat([part.crops[view] for part in parts]))


@pytest.mark.parametrize("workers", [0, 2])
def test_restore_goes_on_with_the_same_crops(source, reference, workers):
    stream = build(source)
    for step in (1, 7):
        stream.load_state_dict(build(source).state_dict() | {"position": 0})
        take(stream, step)
        restored = build(source, workers)
        restored.load_state_dict(stream.state_dict())
        assert all(same(*pair) for pair in zip(take(restored, 3), reference[step : step + 3], strict=True))


def test_each_epoch_draws_anew(reference):
    epochs = torch.cat([batch.epoch for batch in reference])
    samples = torch.cat([batch.sample for batch in reference])
    crops = torch.cat([batch.crops[0] for batch in reference])
    first, second = (crops[epochs == epoch][samples[epochs == epoch].argsort()] for epoch in (0, 1))
    assert len(first) == len(second) == TOTAL
    assert (first[:, :4] != second[:, :4]).any(1).all()


@pytest.mark.parametrize(("workers", "decode"), [(0, "cpu"), (2, "cpu"), (0, "gpu"), (2, "gpu")])
def test_a_replaced_image_has_the_crops_of_its_replacement(damaged, device, workers, decode):
    fields = {"decode": decode, "max_skipped_fraction": 1.0, "device": device}
    stream = build(damaged, workers, **fields)
    batches = take(stream)
    assert set(stream.skipped) == {"truncated", "undecodable"}
    check(damaged, batches)
    assert all(same(*pair) for pair in zip(batches, take(build(damaged, max_skipped_fraction=1.0)), strict=True))


def test_a_reduced_scale_moves_a_view_by_less_than_a_pixel_of_it(tmp_path):
    """The decoder gives an image eight times smaller: the box that is said is the one that was drawn."""
    coarse = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    image, buffer = Image.fromarray(coarse).resize((1600, 1200), Image.Resampling.BICUBIC), io.BytesIO()
    image.save(buffer, format="JPEG", quality=95)
    group = ViewGroup(count=8, size=(64, 64), scale=(0.5, 1.0))
    source = ShardSource(write_shards([buffer.getvalue()], tmp_path))
    batch = next(StreamConfig(global_batch_size=1, views=(group,)).build(source, seed=0))
    for view, crop in zip(batch.views, batch.crops, strict=True):
        assert np.abs(view[0].numpy().astype(int) - cut(buffer.getvalue(), group, crop[0])).mean() < 4
