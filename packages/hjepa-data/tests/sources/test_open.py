"""What a text names, in ``open_source`` and in ``hjepa-shards make``."""

import json
import warnings

import numpy as np
import pytest

from hjepa_data import (
    DataError,
    FileSource,
    FolderSource,
    HuggingFaceSource,
    ShardSource,
    TorchvisionSource,
    open_source,
    write_shards,
)
from hjepa_data.shards.cli import main
from hjepa_data.shards.make import MakeConfig, make_shards, plan_sources

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    datasets = pytest.importorskip("datasets")


@pytest.fixture
def saved(rows, tmp_path):
    """Data sets on the disk: one split, and two."""
    rows.save_to_disk(tmp_path / "rows")
    datasets.DatasetDict({"train": rows, "test": rows.select(range(9))}).save_to_disk(tmp_path / "both")
    return tmp_path


def test_what_lies_there_decides(pets, shards, saved):
    assert isinstance(open_source(pets), FolderSource)
    assert isinstance(open_source(str(pets / "cat")), FolderSource)
    for pattern in (shards, f"{shards}/*.tar", [f"{shards}/train-{{000000..000002}}.tar"]):
        assert isinstance(open_source(pattern), ShardSource)
    assert isinstance(open_source(f"hf:{saved}/rows"), HuggingFaceSource)
    assert len(open_source(f"hf:{saved}/both:test")) == 9
    assert isinstance(open_source(f"torchvision:ImageFolder:{pets}"), TorchvisionSource)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{tmp}/mixed", r"holds 1 \*.tar and images such as 'a.jpg'"),
        ("{tmp}/empty", r"holds neither shards \(\*.tar\) nor images"),
        ("{tmp}/gone", "no such shard"),
        ("{tmp}/mixed/a.jpg", None),
        ("hf:{tmp}/both", "has the splits train, test; give one of them: 'hf:.*/both:train'"),
        ("hf:{tmp}/both:val", "both:val: there is no such split"),
        ("hf:{tmp}/gone", "hf:.*gone"),
        ("hf:", "'hf:' names no data set; allowed: hf:NAME"),
        ("torchvision:CIFAR10", "names no data set; allowed: .*torchvision:CLASS:ROOT"),
        ("torchvision:CIFAR10:{tmp}", "torchvision:CIFAR10:.*not found"),
        ("torchvision:CIFAR10:{tmp}:val", "CIFAR10 has no split 'val'; allowed: train, test"),
        ("torchvision:ImageFolder:{tmp}/mixed:test", "ImageFolder has no splits, but 'test' is asked for"),
        ("torchvision:os:{tmp}", "torchvision has no data set 'os'"),
        ("torchvision:FakeData:{tmp}", "torchvision has no data set 'FakeData' in a folder"),
    ],
)
def test_what_is_no_source_is_one_line(saved, jpeg, text, words, capsys):
    for name in ("mixed", "empty"):
        (saved / name).mkdir()
    (saved / "mixed" / "a.jpg").write_bytes(jpeg(0))
    write_shards([jpeg(0)], saved / "mixed")
    with pytest.raises(DataError, match=words) as caught:
        open_source(text.format(tmp=saved))
    assert "\n" not in str(caught.value)
    if text.startswith(("hf:", "torchvision:")) and "splits train" not in str(caught.value):
        capsys.readouterr()
        assert main(["make", text.format(tmp=saved), str(saved / "out")]) == 2
        said = capsys.readouterr().err
        assert said[said.index("hjepa-shards:") :].count("\n") == 1


def content(pattern):
    source = ShardSource(pattern)
    return sorted((sample.image, sample.label) for sample in map(source.read, range(len(source))))


def test_shards_of_a_data_set(saved, jpeg, capsys):
    out = saved / "out"
    assert main(["make", f"hf:{saved}/both", str(out), "--samples-per-shard", "10", "--workers", "1"]) == 0
    assert "3 classes (cat, dog, emu)" in capsys.readouterr().out
    assert json.loads((out / "classes.json").read_text()) == ["cat", "dog", "emu"]
    assert content(f"{out}/train-*.tar") == sorted((jpeg(n), n % 3) for n in range(31))
    assert content(f"{out}/test-*.tar") == sorted((jpeg(n), n % 3) for n in range(9))


def test_split_by_hash_and_any_number_of_workers(saved, jpeg):
    found = []
    for workers in ("1", "3"):
        out = saved / f"out{workers}"
        options = ["--val-fraction", "0.3", "--shard-size", "9K", "--workers", workers]
        assert main(["make", f"hf:{saved}/rows", str(out), *options]) == 0
        found.append({path.name: path.read_bytes() for path in out.glob("*.tar")})
    assert found[0] == found[1]
    assert len(found[0]) > 5
    train, val = content(f"{saved}/out1/train-*.tar"), content(f"{saved}/out1/val-*.tar")
    assert sorted(train + val) == sorted((jpeg(n), n % 3) for n in range(31))
    assert 3 <= len(val) <= 16
    sizes = ShardSource(f"{saved}/out1/train-*.tar").group_sizes
    assert max(sizes) - min(sizes) <= 1


def test_shards_of_pixels(tmp_path, pets):
    from PIL import Image

    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (7, 28, 28), dtype=np.uint8)
    (raw / "t10k-images-idx3-ubyte").write_bytes(
        b"\x00\x00\x08\x03" + b"".join(side.to_bytes(4, "big") for side in pixels.shape) + pixels.tobytes()
    )
    (raw / "t10k-labels-idx1-ubyte").write_bytes(b"\x00\x00\x08\x01\x00\x00\x00\x07" + bytes(range(7)))
    for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"):
        (raw / name).write_bytes(b"")
    out = tmp_path / "out"
    assert main(["make", f"torchvision:MNIST:{tmp_path}:test", str(out), "--workers", "1"]) == 0
    source = ShardSource(out / "test-000000.tar")
    import io

    for sample in map(source.read, range(7)):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(sample.image))), pixels[sample.label])
    assert main(["make", f"torchvision:ImageFolder:{pets}", str(out), "--labels", "none", "--workers", "1"]) == 0
    assert set(ShardSource(out / "train-000000.tar").labels.tolist()) == {-1}


def test_a_sample_that_cannot_be_read_is_left_out_whatever_is_measured(tmp_path, jpeg):
    (tmp_path / "a.jpg").write_bytes(jpeg(1))
    source = FileSource(["a.jpg", "gone.jpg"], np.array([-1, -1]), root=str(tmp_path))
    result = make_shards(plan_sources({"train": source}, [], MakeConfig()), tmp_path / "out", MakeConfig())
    assert (result.images, result.left_out) == ({"train": 1}, {"unreadable": 1})


def test_damaged_rows_are_left_out_and_counted(rows, tmp_path, capsys):
    images = [{"bytes": b"junk", "path": None}, None, {"bytes": rows[0]["pixels"] and b"", "path": None}]
    features = datasets.Features({"image": datasets.Image()})
    good = [
        {"bytes": image["bytes"], "path": None}
        for image in rows.cast_column("pixels", datasets.Image(decode=False))["pixels"]
    ]
    datasets.Dataset.from_dict({"image": good + images}, features=features).save_to_disk(tmp_path / "rows")
    capsys.readouterr()
    assert main(["make", f"hf:{tmp_path}/rows", str(tmp_path / "out"), "--workers", "2"]) == 0
    printed = capsys.readouterr().out
    assert "3 files left out" in printed
    assert "row 31" in printed
    assert len(ShardSource(tmp_path / "out")) == 31
