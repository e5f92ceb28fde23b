"""libjpeg-turbo beside Pillow: the same pixels, and the same verdict on damaged files."""

import io

import numpy as np
import pytest
from PIL import Image

from hjepa_data.transforms.decode import SkipImageError, open_image
from hjepa_data.transforms.jpeg import decode_jpeg

LIMIT = 10**6
# Pillow's numbers of 4:4:4, 4:2:2 and 4:2:0.
SAMPLINGS = {"4:4:4": 0, "4:2:2": 1, "4:2:0": 2}
KINDS = {"baseline": {}, "progressive": {"progressive": True}, "restarts": {"restart_marker_blocks": 3}}


def photo(seed, width=83, height=117, mode="RGB"):
    """Coarse and fine noise, so that each row differs from the next."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8)).resize((width, height))
    noisy = np.asarray(coarse).astype(int) + rng.integers(-20, 21, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).convert(mode)


def encoded(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", **{"quality": 90, **options})
    return buffer.getvalue()


def opened(data):
    return open_image(data, max_pixels=LIMIT)


def by_pillow(data, scale=1):
    return np.array(opened(data).decode(scale))


@pytest.mark.parametrize("scale", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampling", [*SAMPLINGS, "grey"])
def test_pixels_down_to_any_row_are_those_of_pillow(sampling, kind, scale):
    options = KINDS[kind] if sampling == "grey" else {**KINDS[kind], "subsampling": SAMPLINGS[sampling]}
    data = encoded(photo(1, mode="L" if sampling == "grey" else "RGB"), **options)
    expected, image = by_pillow(data, scale), opened(data).image
    for rows in range(1, len(expected) + 1):
        found = decode_jpeg(data, image, scale, rows)
        assert found.shape[1:] == expected.shape[1:]
        assert np.array_equal(found[:rows], expected[:rows])


@pytest.mark.parametrize("size", [(8, 8), (9, 1), (8, 200), (33, 17), (200, 9)])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_small_sides(size, sampling):
    data = encoded(photo(2, *size), subsampling=SAMPLINGS[sampling])
    # A crop is never shrunk by more than its sides.
    for scale in (scale for scale in (1, 2, 4, 8) if scale <= min(size)):
        assert np.array_equal(decode_jpeg(data, opened(data).image, scale, size[1]), by_pillow(data, scale))


def test_nothing_below_the_rows_is_decoded():
    data = encoded(photo(3, height=400))
    image = opened(data).image
    assert [len(decode_jpeg(data, image, 1, rows)) for rows in (1, 50, 200, 399)] == [16, 64, 208, 400]
    assert [len(decode_jpeg(data, image, 4, rows)) for rows in (1, 50, 99)] == [4, 52, 100]
    # The scans of a progressive file are all needed.
    data = encoded(photo(3, height=400), progressive=True)
    assert len(decode_jpeg(data, opened(data).image, 1, 1)) == 400


def test_rows_below_may_be_damaged_as_for_pillow():
    data = bytearray(encoded(photo(4, height=400)))
    data[-400:-200] = bytes(200)
    image = opened(bytes(data)).image
    assert np.array_equal(decode_jpeg(bytes(data), image, 1, 100)[:100], by_pillow(bytes(data))[:100])
    # Of what it had to guess Pillow is asked.
    assert decode_jpeg(bytes(data), image, 1, 400) is None
    assert np.array_equal(opened(bytes(data)).pixels(1, 400), by_pillow(bytes(data)))


def damaged(data, rng):
    data = bytearray(data)
    match rng.integers(5):
        case 0:
            for _ in range(rng.integers(1, 4)):
                data[rng.integers(2, len(data) - 2)] = rng.integers(256)
        case 1:
            del data[rng.integers(2, len(data)) :]
        case 2:
            data[rng.integers(2, len(data)) :] = b"\xff\xd9"
        case 3:
            start = rng.integers(2, len(data) - 60)
            del data[start : start + rng.integers(1, 50)]
        case 4:
            data[rng.integers(2, 700)] = rng.integers(256)
    return bytes(data)


def verdict(read):
    try:
        return "shown", read()
    except SkipImageError as skip:
        return str(skip.reason), None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_found_where_pillow_finds_it_and_shown_as_pillow_shows_it(kind):
    rng = np.random.default_rng(5)
    verdicts = []
    for number in range(300):
        good = encoded(photo(number, 61, 47), subsampling=number % 3, **KINDS[kind])
        data, part = damaged(good, rng), rng.random()
        expected, pixels = verdict(lambda data=data: by_pillow(data))
        rows = 1 if pixels is None else max(1, int(part * len(pixels)))
        found, ours = verdict(lambda data=data, rows=rows: opened(data).pixels(1, rows))
        assert found == expected
        if pixels is not None:
            assert np.array_equal(ours[:rows], pixels[:rows])
        verdicts.append(found)
    assert {"shown", "truncated", "undecodable"} <= set(verdicts)


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(photo(6), exif=exif)


@pytest.mark.parametrize(
    "data",
    [
        encoded(photo(6, mode="CMYK")),
        turned(6),
        encoded(photo(6, width=7)),
        encoded(photo(6)) + b"\0",
    ],
    ids=["CMYK", "turned", "narrow", "no end"],
)
def test_what_goes_to_pillow(data):
    upright = opened(data)
    assert upright.jpeg == b""
    assert np.array_equal(upright.pixels(2, 1), by_pillow(data, 2))


@pytest.mark.parametrize(
    "data",
    [
        encoded(photo(6)),
        encoded(photo(6, mode="L")),
        encoded(photo(6), progressive=True),
        encoded(photo(6), keep_rgb=True),
        turned(1),
    ],
    ids=["colour", "grey", "progressive", "RGB-coded", "upright"],
)
def test_what_goes_to_libjpeg_turbo(data, monkeypatch):
    upright, expected = opened(data), by_pillow(data)
    monkeypatch.setattr(Image.Image, "load", None)
    assert np.array_equal(upright.pixels(1, len(expected)), expected)


def test_a_file_of_another_size_than_was_checked_is_left_to_pillow():
    small, large = encoded(photo(7)), encoded(photo(7, 640, 480))
    assert decode_jpeg(large, opened(small).image, 1, 1) is None
    assert decode_jpeg(small, opened(large).image, 1, 1) is None


def test_sampling_without_a_name_is_left_to_pillow():
    data = bytearray(encoded(photo(8), subsampling=0))
    frame = data.index(b"\xff\xc0")
    # Three rows of luminance blocks beside one of each colour: legal, and made by nobody.
    data[frame + 11] = 0x13
    assert decode_jpeg(bytes(data), opened(bytes(data)).image, 1, 1) is None
    assert np.array_equal(opened(bytes(data)).pixels(1, 1), by_pillow(bytes(data)))
