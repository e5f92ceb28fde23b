"""Decoding on the device: on a CPU the same code runs with torchvision's decoder for CPUs."""

import io
import itertools
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image, ImageOps

from hjepa_data import DataError, DevicePrefetcher, ShardSource, StreamConfig, ViewGroup, WorkerConfig, write_shards
from hjepa_data.stream import gpu_decode
from hjepa_data.stream.gpu_decode import Encoded, turned
from hjepa_data.stream.worker import _CROP
from hjepa_data.transforms.crop import crop_plans
from hjepa_data.transforms.decode import Upright, open_image

TOTAL, BATCH, SEED = 44, 8, 3
VIEWS = (
    ViewGroup(count=2, size=(24, 32), scale=(0.2, 1.0)),
    ViewGroup(size=(16, 16), scale=(0.05, 0.3), interpolation="bicubic"),
)
# PNG, WebP, grey, CMYK, no end marker at the end, stored as RGB.
BY_WORKERS = {5, 6, 7, 8, 13, 14}
BAD = {3: "truncated", 4: "undecodable", 9: "undecodable", 30: "empty"}


def photo(number, mode="RGB"):
    """A picture with coarse structure, so that another box or flip changes it much."""
    coarse = np.random.default_rng(number).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((150 + number, 120), Image.Resampling.BICUBIC).convert(mode)


def saved(image, kind="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def with_broken_table(data):
    """The header is whole, the Huffman table is not."""
    place = data.index(b"\xff\xc4") + 5
    return data[:place] + b"\xff" * 16 + data[place + 16 :]


def oriented(number):
    exif = Image.Exif()
    exif[0x0112] = number % 8 + 1
    return saved(photo(number), exif=exif.tobytes())


def encoded(number):
    special = {
        3: lambda data: data[: len(data) // 2],
        4: with_broken_table,
        9: lambda data: data[:3] + b"junk" * 9 + b"\xff\xd9",
        30: lambda _: b"",
        # A comment that never ends, after the pixels: Pillow reads it, torchvision refuses it.
        12: lambda data: data[:-2] + b"\xff\xfe\xff\xff\xff\xd9",
        # No end of image in the last two bytes, but whole.
        13: lambda data: data + b"more",
        5: lambda _: saved(photo(5), "PNG"),
        6: lambda _: saved(photo(6), "WEBP"),
        7: lambda _: saved(photo(7, "L")),
        8: lambda _: saved(photo(8, "CMYK")),
        10: lambda _: saved(photo(10), progressive=True),
        11: lambda _: saved(photo(11), subsampling=0),
        14: lambda _: saved(photo(14), keep_rgb=True),
    }
    data = oriented(number) if number >= 32 else saved(photo(number), quality=90)
    return special[number](data) if number in special else data


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed")
    for first in range(0, TOTAL, 11):
        with tarfile.open(folder / f"{first:02d}.tar", "w") as tar:
            for number in range(first, first + 11):
                data = encoded(number)
                for name, content in ((f"{number}.jpg", data), (f"{number}.cls", str(number % 7).encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return ShardSource(folder)


def build(source, device, decode="gpu", workers=0, max_skipped_fraction=0.5, **place):
    config = StreamConfig(
        global_batch_size=BATCH,
        window_shards=2,
        views=VIEWS,
        workers=WorkerConfig(count=workers, pin_memory=True),
        decode=decode,
        max_skipped_fraction=max_skipped_fraction,
    )
    return config.build(source, seed=SEED, device=device, **place)


def take(stream, count=11):
    return list(itertools.islice(stream, count))


def numbers(batches):
    return [torch.cat([getattr(b, name) for b in batches]).tolist() for name in ("sample", "epoch", "labels")]


def same(one, two):
    return all(torch.equal(a, b) for a, b in zip((*one.views, *one.numbers), (*two.views, *two.numbers), strict=True))


@pytest.fixture(scope="module")
def reference(source, device):
    return take(build(source, device))


def test_images_and_crops_are_those_of_the_cpu_path(source, device):
    plain, stream = build(source, "cpu", "cpu"), build(source, device)
    expected, found = take(plain), take(stream)
    assert numbers(found) == numbers(expected)
    assert stream.skipped == plain.skipped
    # In two epochs.
    assert {reason: count // 2 for reason, count in stream.skipped.items()} == {
        "truncated": 1,
        "undecodable": 2,
        "empty": 1,
    }
    shown = set(numbers(found)[0])
    assert shown == set(range(TOTAL)) - set(BAD)
    for batch, right in zip(found, expected, strict=True):
        assert all(torch.equal(*pair) for pair in zip(batch.crops, right.crops, strict=True))
        for view, pixels in zip(batch.views, right.views, strict=True):
            assert view.dtype == torch.uint8
            assert view.device.type == device.type
            assert view.shape == pixels.shape
            far = (view.cpu().float() - pixels.float()).abs().mean((1, 2, 3))
            # The CPU path decodes at half scale, or less, and rounds the boxes to its pixels.
            assert far.max() < 8, batch.sample[far.argmax()]
            assert far.mean() < 4
    wrong = (expected[0].views[0].float() - expected[0].views[0].flip(3).float()).abs().mean((1, 2, 3))
    assert wrong.min() > 10


def test_pixels_are_those_of_pillow_at_full_scale(source, device, reference):
    """An oracle: the upright image, cut at the drawn box, resized by Pillow, mirrored."""
    resampling = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    order, checked = build(source, device)._order, 0
    for step, batch in enumerate(reference[:5]):
        for row, (number, epoch) in enumerate(zip(batch.sample.tolist(), batch.epoch.tolist(), strict=True)):
            # The workers or Pillow decode these, and what is shown in the place of 3 and 4.
            if number in BY_WORKERS | {12} or order.at(step * BATCH + row)[1] in {3, 4}:
                continue
            image = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded(number))))
            upright = Upright(image=image, turn=None, width=image.width, height=image.height)
            plans = crop_plans(upright, VIEWS, (SEED, _CROP, epoch, number))
            for view, (group, (left, top, width, height), flip) in zip(batch.views, plans, strict=True):
                crop = image.crop((left, top, left + width, top + height))
                right = np.asarray(crop.resize(group.size[::-1], resampling[group.interpolation])).astype(float)
                found = view[row].permute(1, 2, 0).cpu().numpy()
                far = np.abs(found - (right[:, ::-1] if flip else right))
                assert far.mean() < (0.5 if device.type == "cpu" else 4), (number, far.mean())
                checked += 1
    assert checked > 80


def test_only_whole_colour_jpegs_are_left_to_the_device(source, device):
    """nvJPEG may smooth over a file that is cut off, so that it must not get one."""
    stream, sent = build(source, device), set()
    for start in range(0, TOTAL, 4):
        loaded = stream._tasks[start]
        sent |= set(loaded.batch.sample[loaded.encoded.rows].tolist())
    # The broken table of 4 is found by the decoder.
    assert sent == set(range(TOTAL)) - BY_WORKERS - (set(BAD) - {4})


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_change_a_bit(source, device, reference, workers):
    stream = DevicePrefetcher(build(source, device, workers=workers), device)
    assert all(same(a.to("cpu"), b.to("cpu")) for a, b in zip(take(stream), reference, strict=True))
    stream.close()


def test_ranks_share_the_same_batches(source, device, reference):
    ranks = [take(build(source, device, rank=rank, world_size=2)) for rank in range(2)]
    for whole, *parts in zip(reference, *ranks, strict=True):
        assert torch.equal(whole.sample, torch.cat([part.sample for part in parts]))
        for number, view in enumerate(whole.views):
            assert torch.equal(view, torch.cat([part.views[number] for part in parts]))


def test_restore_at_every_step_on_either_path(source, device, reference):
    stream, plain = build(source, device), build(source, "cpu", "cpu")
    states = []
    for _ in reference:
        states.append(stream.state_dict())
        assert plain.state_dict() == states[-1]
        next(stream)
        next(plain)
    for step in range(len(reference) - 1, -1, -1):
        stream.load_state_dict(states[step])
        assert same(next(stream), reference[step])


def test_an_image_that_only_pillow_reads_is_shown_and_announced(source, device, caplog):
    take(build(source, device), 6)
    if device.type == "cpu":
        assert sum("Pillow tries" in record.message for record in caplog.records) == 1


def test_images_are_decoded_in_parts_that_fit(source, device, reference, monkeypatch):
    monkeypatch.setattr(gpu_decode, "_MAX_PIXELS_AT_ONCE", 40_000)
    assert [list(part) for part in gpu_decode._parts([30_000, 9_000, 90_000, 1, 1])] == [[0, 1], [2], [3, 4]]
    assert all(same(a, b) for a, b in zip(take(build(source, device), 3), reference, strict=False))


def test_nvjpeg_begins_when_the_stream_of_its_memory_is_done(monkeypatch):
    done = []
    stream = SimpleNamespace(synchronize=lambda: done.append("stream"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    monkeypatch.setattr(torchvision.io, "decode_jpeg", lambda files, **_: [*files, *(done.append("decoder") or ())])
    gpu_decode._decode_jpegs([], torch.device("cuda"))
    assert done == ["stream", "decoder"]


@pytest.mark.cuda
def test_crops_that_a_busy_device_has_not_cut_yet_are_not_written_over(monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    monkeypatch.setattr(gpu_decode, "_MAX_PIXELS_AT_ONCE", 1)
    files, encoded = [saved(photo(0).rotate(30 * number)) for number in range(8)], Encoded()
    for row, file in enumerate(files):
        upright = open_image(file, max_pixels=1 << 20)
        encoded.add(row, upright, len(file), [(VIEWS[0], (0, 0, upright.width, upright.height), False)])
    encoded.data = torch.frombuffer(bytearray().join(files), dtype=torch.uint8)
    none = torch.empty(0, 3, *VIEWS[0].size, dtype=torch.uint8)
    views = []
    for cycles in (0, 1 << 30):
        torch.cuda._sleep(cycles)
        views.append(gpu_decode.decode_views(encoded, [none], len(files), torch.device("cuda"))[0][0].cpu())
    assert torch.equal(*views)


def test_too_many_damaged_images_stop_the_stream(tmp_path, device):
    images = [with_broken_table(saved(photo(n))) if n % 2 else saved(photo(n)) for n in range(40)]
    stream = build(ShardSource(write_shards(images, tmp_path, samples_per_shard=10)), device, max_skipped_fraction=0.01)
    with pytest.raises(DataError, match=r"1\d .*undecodable.*max_skipped_fraction=0.01"):
        take(stream)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turns_are_those_of_pillow(device, orientation):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 3), dtype=np.uint8)
    turn = None if orientation == 1 else Image.Transpose((orientation - 2) % 7)
    image = Image.fromarray(pixels)
    expected = np.asarray(image if turn is None else image.transpose(turn)).transpose(2, 0, 1)
    assert np.array_equal(turned(torch.from_numpy(pixels).permute(2, 0, 1).to(device), turn).cpu().numpy(), expected)


def test_wrong_settings_are_refused(source):
    with pytest.raises(ValueError, match="decode='tpu': no such place; allowed: cpu, gpu"):
        StreamConfig(decode="tpu")
    with pytest.raises(ValueError, match="cache_bytes=1: decode='gpu' leaves no decoded image"):
        StreamConfig(decode="gpu", cache_bytes=1)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="decode='gpu': there is no CUDA device; allowed: cpu"):
            build(source, "cuda")


@pytest.mark.cuda
def test_nvjpeg_decodes_what_the_cpu_path_shows(source):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    stream, plain = DevicePrefetcher(build(source, "cuda", workers=2), "cuda"), build(source, "cpu", "cpu")
    for _ in range(12):
        batch, right = next(stream), next(plain)
        for view, pixels in zip(batch.views, right.views, strict=True):
            assert view.is_cuda
            far = (view.cpu().float() - pixels.float()).abs().mean((1, 2, 3))[batch.sample.cpu() == right.sample]
            assert far.median() < 4
        for crop, box in zip(batch.crops, right.crops, strict=True):
            assert crop.is_cuda
            alike = batch.sample.cpu() == right.sample
            assert torch.equal(crop.cpu()[alike], box[alike])
    stream.close()
