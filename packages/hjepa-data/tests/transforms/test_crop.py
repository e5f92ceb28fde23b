import io
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode

from hjepa_data import EvalConfig, SkipReason, StreamConfig, ViewGroup
from hjepa_data.random import Draws
from hjepa_data.shards.check import CheckConfig
from hjepa_data.shards.make import MakeConfig
from hjepa_data.shards.show import SheetConfig
from hjepa_data.transforms.crop import crop_plans, cut_views, resized_crop_box
from hjepa_data.transforms.decode import SkipImageError, open_image

LIMIT = 10**8
_MODES = {"bilinear": InterpolationMode.BILINEAR, "bicubic": InterpolationMode.BICUBIC}


def encoded(pixels, kind="PNG", **options):
    buffer = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(buffer, format=kind, **options)
    return buffer.getvalue()


def views(data, *groups, key=(0, 0, 0)):
    sizes = [group.size for group in groups for _ in range(group.count)]
    out = [np.zeros((1, 3, *size), dtype=np.uint8) for size in sizes]
    upright = open_image(data, max_pixels=LIMIT)
    cut_views(upright, crop_plans(upright, groups, key), out, 0)
    return [array[0] for array in out]


@given(
    width=st.integers(1, 700),
    height=st.integers(1, 700),
    low=st.floats(0.05, 1),
    seed=st.integers(0, 10**6),
)
def test_box_lies_inside(width, height, low, seed):
    left, top, w, h = resized_crop_box(Draws(seed), width, height, (low, 1.0), (3 / 4, 4 / 3))
    assert 0 <= left <= left + w <= width
    assert 0 <= top <= top + h <= height
    assert min(w, h) >= 1


def test_box_has_the_distribution_of_torchvision():
    import torch
    from torchvision.transforms.v2 import RandomResizedCrop

    scale, ratio = (0.2, 1.0), (0.6, 1.8)
    ours = np.array([resized_crop_box(Draws(1, n), 300, 200, scale, ratio) for n in range(4000)], dtype=float)
    image = torch.zeros(1, 200, 300)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        crop = RandomResizedCrop(8, scale=scale, ratio=ratio)
        drawn = [crop.make_params([image]) for _ in range(4000)]
    theirs = np.array([(p["left"], p["top"], p["width"], p["height"]) for p in drawn], dtype=float)
    for measure in (
        lambda b: b[:, 0],
        lambda b: b[:, 1],
        lambda b: b[:, 2] * b[:, 3],
        lambda b: np.log(b[:, 2] / b[:, 3]),
    ):
        a, b = measure(ours), measure(theirs)
        error = math.sqrt(a.var() / len(a) + b.var() / len(b))
        assert abs(a.mean() - b.mean()) < 4.5 * error
        assert abs(a.std() / b.std() - 1) < 0.06


def test_crop_equals_plain_pillow():
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    group = ViewGroup(size=(20, 24), flip=0.0)
    (view,) = views(encoded(pixels), group, key=(5, 6, 7))
    left, top, w, h = resized_crop_box(Draws(5, 6, 7, 0), 70, 50, group.scale, group.ratio)
    plain = Image.fromarray(pixels).crop((left, top, left + w, top + h)).resize((24, 20), Image.Resampling.BILINEAR)
    # A box takes in the pixels beyond its border where the filter reaches over it, a crop does not.
    inner = np.abs(view[:, 2:-2, 2:-2].astype(int) - np.asarray(plain).transpose(2, 0, 1)[:, 2:-2, 2:-2])
    assert inner.max() <= 1


def test_multi_crop_of_two_global_and_six_local_views():
    ramp = np.zeros((100, 120, 3), dtype=np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(120), np.arange(100)[:, None]
    groups = (
        ViewGroup(count=2, size=(64, 64), scale=(0.4, 1.0), flip=0.0),
        ViewGroup(count=6, size=(32, 32), scale=(0.05, 0.4), flip=0.0),
    )
    for sample in range(20):
        found = views(encoded(ramp), *groups, key=(0, 0, sample))
        assert [view.shape for view in found] == [(3, 64, 64)] * 2 + [(3, 32, 32)] * 6
        # The ramps say where each view lies.
        for number, view in enumerate(found):
            low, high = groups[number >= 2].scale
            width, height = (int(view[c].max()) - int(view[c].min()) + 1 for c in (0, 1))
            assert low * 0.8 < width * height / 12_000 < high * 1.1
            left, top, _, _ = resized_crop_box(Draws(0, 0, sample, number), 120, 100, (low, high), (3 / 4, 4 / 3))
            assert abs(int(view[0].min()) - left) <= 1
            assert abs(int(view[1].min()) - top) <= 1
        assert len({(view.min(), view.max(), view.mean()) for view in found}) == 8


def test_crop_equals_torchvision():
    import torch
    from torchvision.transforms.v2.functional import resized_crop

    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    for kind in ("bilinear", "bicubic"):
        group = ViewGroup(size=(20, 24), flip=0.0, interpolation=kind)
        (view,) = views(encoded(pixels), group, key=(5, 6, 7))
        left, top, w, h = resized_crop_box(Draws(5, 6, 7, 0), 70, 50, group.scale, group.ratio)
        image = torch.from_numpy(pixels).permute(2, 0, 1)
        expected = resized_crop(image, top, left, h, w, [20, 24], interpolation=_MODES[kind], antialias=True)
        assert np.abs(view.astype(int) - expected.numpy()).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_the_image_before_it_is_cropped(orientation):
    """A photograph that is stored turned gives the views of the upright one."""
    upright = np.zeros((40, 60, 3), dtype=np.uint8)
    upright[..., 0], upright[..., 1] = np.arange(60) * 4, np.arange(40)[:, None] * 6
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    image = Image.fromarray(upright)
    stored = image.transpose(Image.Transpose(back[orientation])) if orientation > 1 else image
    exif = Image.Exif()
    exif[0x0112] = orientation
    group = ViewGroup(size=(16, 16))
    (found,) = views(encoded(stored, "PNG", exif=exif), group)
    (expected,) = views(encoded(image), group)
    assert np.array_equal(found, expected)


def test_flip_mirrors():
    pixels = np.random.default_rng(0).integers(0, 256, (30, 30, 3), dtype=np.uint8)
    (plain,) = views(encoded(pixels), ViewGroup(size=(16, 16), flip=0.0))
    (mirror,) = views(encoded(pixels), ViewGroup(size=(16, 16), flip=1.0))
    assert np.array_equal(plain[:, :, ::-1], mirror)
    flips = [Draws(0, n) for n in range(100)]
    assert 30 < sum(draw.uniform() < 0.5 for draw in flips) < 70


def test_reduced_jpeg_scale_looks_the_same():
    coarse = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((1600, 1200), Image.Resampling.BICUBIC)
    group = ViewGroup(size=(64, 64), scale=(0.5, 1.0))
    data = encoded(image, "JPEG", quality=95)
    upright = open_image(data, max_pixels=LIMIT)
    assert upright.decode(9.0).size == (200, 150)
    (reduced,), (full,) = views(data, group), views(encoded(image), group)
    # Corners go to the nearest pixel of the reduced image, here at most a third of a pixel of the view.
    assert np.abs(reduced.astype(int) - full).mean() < 4
    (elsewhere,) = views(encoded(image), group, key=(0, 0, 1))
    assert np.abs(elsewhere.astype(int) - full).mean() > 20


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "CMYK", "LA"])
def test_every_mode_becomes_rgb(mode):
    image = Image.fromarray(np.full((20, 20, 3), 200, dtype=np.uint8)).convert(mode)
    kind = "JPEG" if mode == "CMYK" else "PNG"
    (view,) = views(encoded(image, kind), ViewGroup(size=(8, 8)))
    assert view.shape == (3, 8, 8)
    assert np.abs(view.astype(int) - (200 if mode != "1" else view.astype(int))).max() < 20


def test_transparency_of_a_palette_is_dropped_without_a_warning():
    image = Image.new("P", (20, 20), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", transparency=bytes([255, 7]))
    (view,) = views(buffer.getvalue(), ViewGroup(size=(8, 8)))
    assert view[:, 3, 3].tolist() == [200, 100, 50]


def test_16_bit_grey_is_scaled_not_clipped():
    grey = Image.fromarray(np.full((20, 20), 100 * 256, dtype=np.uint16))
    (view,) = views(encoded(grey), ViewGroup(size=(8, 8)))
    assert np.unique(view).tolist() == [100]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", SkipReason.EMPTY),
        (b"\xff\xd8\xff\xe0 no image", SkipReason.UNDECODABLE),
        (b"GIF89a", SkipReason.UNDECODABLE),
        (encoded(np.zeros((300, 300, 3), dtype=np.uint8)), SkipReason.TOO_LARGE),
    ],
)
def test_bad_images_have_a_reason(data, reason):
    with pytest.raises(SkipImageError) as caught:
        open_image(data, max_pixels=80_000)
    assert caught.value.reason is reason


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_cut_images_are_left_out(kind):
    data = encoded(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8), kind)
    group = ViewGroup(size=(8, 8))
    with pytest.raises(SkipImageError):
        views(data[: len(data) // 2], group)


def test_decompression_bomb_is_refused_before_it_is_decoded():
    data = bytearray(encoded(np.zeros((8, 8), dtype=np.uint8)))
    # The size in the header of the PNG, with its checksum.
    import struct
    import zlib

    data[16:24] = struct.pack(">II", 60_000, 60_000)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    with pytest.raises(SkipImageError) as caught:
        open_image(bytes(data), max_pixels=LIMIT)
    assert caught.value.reason is SkipReason.TOO_LARGE


def test_wrong_fields_are_refused():
    for fields, word in (
        ({"count": 0}, "count=0"),
        ({"size": (0, 4)}, "size="),
        ({"scale": (0.5, 0.2)}, "no range of areas"),
        ({"ratio": (0.0, 1.0)}, "no range of aspects"),
        ({"flip": 1.5}, "no probability"),
        ({"interpolation": "nearest"}, "allowed: bilinear, bicubic"),
    ):
        with pytest.raises(ValueError, match=word):
            ViewGroup(**fields)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_damaged_exif_does_not_cost_the_image(kind):
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    whole = exif.tobytes()
    rng = np.random.default_rng(0)
    for _ in range(40):
        damaged = bytearray(whole)
        for place in rng.integers(6, len(whole), 3):
            damaged[place] = rng.integers(256)
        upright = open_image(encoded(Image.new("RGB", (20, 10)), kind, exif=bytes(damaged)), max_pixels=LIMIT)
        assert sorted((upright.width, upright.height)) == [10, 20]
        assert upright.decode(1.0).size == (upright.width, upright.height)


@pytest.mark.parametrize("build", [StreamConfig, EvalConfig, MakeConfig, CheckConfig, SheetConfig])
def test_a_limit_on_pixels_that_pillow_does_not_reach_is_refused(build):
    most = 2 * Image.MAX_IMAGE_PIXELS
    assert build(max_pixels=most).max_pixels == most
    for pixels in (0, most + 1):
        with pytest.raises(ValueError, match=f"^max_pixels={pixels}: no limit on pixels; allowed: 1 to {most}"):
            build(max_pixels=pixels)


def test_an_aspect_without_end_is_refused():
    with pytest.raises(ValueError, match=r"^ratio=.*no range of aspects"):
        ViewGroup(ratio=(1.0, math.inf))
