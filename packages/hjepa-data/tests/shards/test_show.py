import base64
import io
import json
import re

import pytest
from PIL import Image

from hjepa_data import DataError, write_shards
from hjepa_data.shards.show import SheetConfig, draw_samples, read_classes, sheet_html, sheet_png


def plain(number):
    """One colour, so that a sheet shows which sample is where."""
    return Image.new("RGB", (60, 40), (number * 20, 255 - number * 20, 100))


@pytest.fixture
def shards(tmp_path):
    paths = write_shards([(plain(n), n % 3) for n in range(10)], tmp_path, samples_per_shard=4)
    (tmp_path / "classes.json").write_text(json.dumps(["cat", "<i>dog</i>"]))
    return paths


def keys(samples):
    return [sample.key for sample in samples]


def test_draw(shards):
    classes = read_classes(shards)
    drawn, total = draw_samples(shards, classes, SheetConfig(count=6, seed=3))
    assert total == 10
    assert len(set(keys(drawn))) == 6
    assert keys(draw_samples(shards, classes, SheetConfig(count=6, seed=3))[0]) == keys(drawn)
    assert keys(draw_samples(shards, classes, SheetConfig(count=6, seed=4))[0]) != keys(drawn)
    every, _ = draw_samples(shards, classes, SheetConfig(count=64))
    assert sorted(keys(every)) == [f"{n:09d}" for n in range(10)]
    captions = {0: "cat (0)", 1: "<i>dog</i> (1)", 2: "class 2"}
    for sample in every:
        number = int(sample.key)
        assert sample.shard == shards[number // 4].name
        assert sample.caption == captions[number % 3]
        assert sample.size == (60, 40)
        assert sample.image.getpixel((0, 0)) == plain(number).getpixel((0, 0))


def test_draw_is_uniform(shards):
    counts = dict.fromkeys((f"{n:09d}" for n in range(10)), 0)
    for seed in range(300):
        for key in keys(draw_samples(shards, [], SheetConfig(count=2, seed=seed, tile=16))[0]):
            counts[key] += 1
    # 60 expected each, standard deviation 7.
    assert all(30 < count < 90 for count in counts.values()), counts


def test_png(shards):
    config = SheetConfig(count=4, tile=60)
    samples, _ = draw_samples(shards, read_classes(shards), config)
    sheet = Image.open(io.BytesIO(sheet_png(samples, "a title", config))).convert("RGB")
    colours = {colour for _, colour in sheet.getcolors(1 << 20)}
    for sample in samples:
        assert sample.image.getpixel((0, 0)) in colours
    others = {plain(n).getpixel((0, 0)) for n in range(10)} - {s.image.getpixel((0, 0)) for s in samples}
    assert not others & colours
    assert sheet.size[0] < 160
    bare = Image.open(io.BytesIO(sheet_png([*samples[:3], samples[3]], "another", config))).convert("RGB")
    assert bare.tobytes() != sheet.tobytes()


def test_html_is_one_safe_file(shards):
    config = SheetConfig(count=10)
    samples, _ = draw_samples(shards, read_classes(shards), config)
    page = sheet_html(samples, "a<b>: 10 of 10", config).decode()
    pictures = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    assert len(pictures) == 10 == page.count("<figure>")
    for sample, picture in zip(samples, pictures, strict=True):
        image = Image.open(io.BytesIO(base64.b64decode(picture)))
        # JPEG moves a colour a little.
        pairs = zip(image.getpixel((5, 5)), plain(int(sample.key)).getpixel((0, 0)), strict=True)
        assert all(abs(one - other) < 8 for one, other in pairs)
        assert f"{sample.shard}: {sample.key}" in page
    assert "<i>" not in page
    assert "&lt;i&gt;dog&lt;/i&gt; (1)" in page
    assert "a&lt;b&gt;" in page
    assert "<script" not in page
    assert not re.findall(r'(?:href|src)="(?!data:)|url\(|@import|https?:', page)


def test_damaged_image_is_shown_as_such(tmp_path, jpeg):
    shards = write_shards([jpeg(0)[:200]], tmp_path)
    config = SheetConfig()
    samples, _ = draw_samples(shards, [], config)
    assert samples[0].image is None
    assert samples[0].caption == "no label"
    assert samples[0].detail in {"truncated", "undecodable"}
    assert sheet_png(samples, "title", config).startswith(b"\x89PNG")
    assert samples[0].detail in sheet_html(samples, "title", config).decode()


def test_class_lists(tmp_path, shards):
    assert read_classes(shards) == ["cat", "<i>dog</i>"]
    other = tmp_path / "other.json"
    other.write_text('["x"]')
    assert read_classes(shards, other) == ["x"]
    for wrong in ("{", '{"a": 1}', "[1]"):
        other.write_text(wrong)
        with pytest.raises(DataError, match="no JSON list of names"):
            read_classes(shards, other)
    with pytest.raises(DataError, match="cannot be read"):
        read_classes(shards, tmp_path / "gone.json")
    (tmp_path / "classes.json").unlink()
    assert read_classes(shards) == []


@pytest.mark.parametrize(("field", "value"), [("count", 0), ("count", 10**6), ("seed", -1), ("tile", 2)])
def test_wrong_settings(field, value):
    with pytest.raises(ValueError, match=f"{field}={value}"):
        SheetConfig(**{field: value})
