import io
import itertools
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from hjepa_data import (
    DataError,
    EvalConfig,
    FolderSource,
    MixtureSource,
    ShardSource,
    StreamConfig,
    ViewGroup,
    WorkerConfig,
)
from hjepa_data.shards.cli import main
from hjepa_data.sources.base import contents_of
from hjepa_data.transforms.decode import SkipImageError, open_image


def content(source):
    return [(sample.image, sample.label) for sample in map(source.read, range(len(source)))]


def test_a_folder_is_the_shards_that_would_be_made_of_it(pets, tmp_path):
    assert main(["make", str(pets), str(tmp_path), "--samples-per-shard", "7", "--workers", "1"]) == 0
    folder, shards = FolderSource(pets, group_size=7), ShardSource(tmp_path)
    assert content(folder) == content(shards)
    assert folder.labels.tolist() == shards.labels.tolist()
    assert folder.group_sizes.tolist() == shards.group_sizes.tolist() == [7, 7, 7, 7, 3]
    config = StreamConfig(global_batch_size=5, window_shards=2, views=(ViewGroup(size=(8, 8)),))
    for one, two in zip(*(itertools.islice(config.build(s, seed=1), 9) for s in (folder, shards)), strict=True):
        assert torch.equal(one.views[0], two.views[0])
        assert torch.equal(one.sample, two.sample)


def test_classes_are_numbered_by_name(pets, jpeg):
    source = FolderSource(pets)
    assert source.classes == ["cat", "dog", "emu"]
    number = {jpeg(n): n for n in range(31)}
    assert sorted(number[image] for image, _ in content(source)) == list(range(31))
    assert all(label == number[image] % 3 for image, label in content(source))
    assert os.path.basename(source.locate(4)) == f"{number[source.read(4).image]}.jpg"
    assert set(FolderSource(pets, labels=False).labels.tolist()) == {-1}


def test_classes_of_another_folder(pets, tmp_path, jpeg):
    (tmp_path / "emu").mkdir()
    (tmp_path / "emu" / "a.jpg").write_bytes(jpeg(0))
    assert FolderSource(tmp_path).labels.tolist() == [0]
    assert FolderSource(tmp_path, classes=FolderSource(pets).classes).labels.tolist() == [2]
    with pytest.raises(DataError, match=r"class folder 'emu' of .* is none of the 1 classes"):
        FolderSource(tmp_path, classes=["cat"])


def test_flat_folder_with_what_people_leave_in_it(tmp_path, jpeg):
    for name in ("a.JPG", "b.jpeg", ".hidden.jpg", "deep/er/c.jpg", ".git/d.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(jpeg(0))
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "gone.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "deep" / "again").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "pipe.jpg")
    source = FolderSource(tmp_path)
    assert sorted(os.path.relpath(source.locate(n), tmp_path) for n in range(3)) == ["a.JPG", "b.jpeg", "deep/er/c.jpg"]
    assert len(source) == 3
    assert source.labels.tolist() == [-1] * 3
    assert source.left_out == {
        "hidden": 2,
        "not an image": 1,
        "broken link": 1,
        "not a file": 1,
        "folder read already": 1,
    }


def test_a_new_file_moves_no_other_past_another(tmp_path, jpeg):
    for number in range(20):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(number))
    before = [image for image, _ in content(FolderSource(tmp_path))]
    (tmp_path / "new.jpg").write_bytes(jpeg(99))
    assert [image for image, _ in content(FolderSource(tmp_path)) if image != jpeg(99)] == before


@pytest.mark.parametrize("kind", ["BMP", "GIF", "TIFF", "PPM", "PNG", "WEBP"])
def test_other_formats_are_read(tmp_path, kind):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    ending = {"TIFF": "tif"}.get(kind, kind.lower())
    image = Image.fromarray(pixels)
    image.save(tmp_path / f"a.{ending}", **({"lossless": True} if kind == "WEBP" else {}))
    expected = np.asarray(Image.open(io.BytesIO((tmp_path / f"a.{ending}").read_bytes())).convert("RGB")).transpose(
        2, 0, 1
    )
    (batch,) = EvalConfig(size=(12, 10), crop_fraction=1.0).build(FolderSource(tmp_path))
    assert np.array_equal(batch.views[0][0].numpy(), expected)
    if kind != "GIF":
        assert np.array_equal(expected.transpose(1, 2, 0), pixels)


def test_pixels_of_unknown_range_are_left_out(tmp_path):
    """Which number is white, no TIFF of 32 bits says; of 16 bits the largest is."""
    for name, kind in (("whole", np.int32), ("unsigned", np.uint32), ("real", np.float32), ("grey", np.uint16)):
        Image.fromarray(np.full((10, 10), 100 * 256, dtype=kind)).save(tmp_path / f"{name}.tif")
    Image.fromarray(np.full((10, 10), 100 * 256, dtype=np.uint16)).save(tmp_path / "grey.pgm")
    stream = EvalConfig(size=(8, 8)).build(FolderSource(tmp_path))
    (batch,) = stream
    assert stream.skipped == {"unknown_range": 3}
    assert batch.views[0].unique().tolist() == [100]


def test_too_large_images_of_other_formats_are_left_out(tmp_path):
    Image.new("RGB", (200, 100)).save(tmp_path / "a.bmp")
    Image.new("RGB", (10, 10)).save(tmp_path / "b.bmp")
    stream = EvalConfig(size=(8, 8), max_pixels=1000).build(FolderSource(tmp_path))
    assert sum(len(batch) for batch in stream) == 1
    assert stream.skipped == {"too_large": 1}


def test_damaged_images_are_left_out_and_counted(tmp_path, jpeg):
    for number in range(9):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(number, size=(60, 80)))
    (tmp_path / "9.jpg").write_bytes(b"")
    (tmp_path / "10.bmp").write_bytes(b"BM no image")
    (tmp_path / "11.jpg").write_bytes(jpeg(3, size=(60, 80))[:900])
    source = FolderSource(tmp_path)
    stream = EvalConfig(size=(8, 8)).build(source)
    assert sum(len(batch) for batch in stream) == 9
    assert stream.skipped == {"empty": 1, "undecodable": 1, "truncated": 1}
    train = StreamConfig(global_batch_size=12, views=(ViewGroup(size=(8, 8)),)).build(source, seed=0)
    assert len(next(train)) == 12
    assert train.skipped == {"empty": 1, "undecodable": 1, "truncated": 1}
    damaged = next(n for n in range(12) if source.locate(n).endswith("10.bmp"))
    with pytest.raises(SkipImageError, match="undecodable"):
        source.read(damaged)


def test_a_file_that_vanishes_is_named_in_one_line(tmp_path, jpeg):
    (tmp_path / "a.jpg").write_bytes(jpeg(0))
    source = FolderSource(tmp_path)
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(DataError, match=r"a.jpg' cannot be read: No such file") as caught:
        source.read(0)
    assert "\n" not in str(caught.value)
    for index in (-1, 1):
        with pytest.raises(IndexError):
            source.read(index)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda t: t / "gone", "no such folder"),
        (lambda t: t / "file", "it is a file"),
        (lambda t: t / "empty", "it is empty"),
        (lambda t: t / "sets", "holds test, train; give one of them: '.*/sets/test'"),
    ],
)
def test_what_is_no_folder_of_images(tmp_path, jpeg, make, words):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for split in ("train", "test"):
        (tmp_path / "sets" / split).mkdir(parents=True)
        (tmp_path / "sets" / split / "a.jpg").write_bytes(jpeg(0))
    with pytest.raises(DataError, match=words) as caught:
        FolderSource(make(tmp_path))
    assert "\n" not in str(caught.value)
    assert len(FolderSource(tmp_path / "sets" / "train")) == 1


def test_group_sizes(pets):
    assert FolderSource(pets, group_size=10).group_sizes.tolist() == [10, 10, 10, 1]
    assert FolderSource(pets, group_size=None).group_sizes.tolist() == [31]
    with pytest.raises(ValueError, match="group_size=0"):
        FolderSource(pets, group_size=0)


def test_copies_and_workers_read_the_same(pets, tmp_path, jpeg):
    source = FolderSource(pets)
    assert content(pickle.loads(pickle.dumps(source))) == content(source)
    config = StreamConfig(global_batch_size=8, views=(ViewGroup(size=(8, 8)),), workers=WorkerConfig(count=2))
    stream = config.build(source, seed=0)
    alone = StreamConfig(global_batch_size=8, views=(ViewGroup(size=(8, 8)),)).build(source, seed=0)
    assert all(torch.equal(next(stream).views[0], next(alone).views[0]) for _ in range(6))
    stream.close()


def test_contents_are_known_wherever_they_lie(pets, tmp_path, jpeg):
    known = contents_of(FolderSource(pets))
    moved = tmp_path / "moved"
    shutil.copytree(pets, moved)
    assert contents_of(FolderSource(moved)) == known
    pair = contents_of(MixtureSource([FolderSource(pets), FolderSource(moved)]))
    first = next(path for path in sorted(moved.rglob("*")) if path.is_file())
    first.rename(first.with_stem(f"{first.stem} renamed"))
    assert contents_of(FolderSource(moved)) != known
    assert contents_of(MixtureSource([FolderSource(pets), FolderSource(moved)])) != pair


def test_names_that_are_no_unicode(tmp_path, jpeg):
    with open(os.path.join(os.fsencode(tmp_path), b"caf\xe9.jpg"), "wb") as file:
        file.write(jpeg(0))
    source = FolderSource(tmp_path)
    assert source.read(0).image == jpeg(0)
    assert source.locate(0).endswith("caf\\xe9.jpg")


def test_bytes_of_the_three_formats_stay_as_they_are(tmp_path, jpeg):
    (tmp_path / "a.jpg").write_bytes(jpeg(0, kind="PNG"))
    (tmp_path / "b.bmp").write_bytes(jpeg(0))
    images = [image for image, _ in content(FolderSource(tmp_path))]
    assert {Image.open(io.BytesIO(image)).format for image in images} == {"PNG", "JPEG"}


def test_no_file_starts_a_program(tmp_path, monkeypatch):
    """Pillow hands EPS to Ghostscript, whatever the file is called."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (programs / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "x.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(SkipImageError):
        open_image(FolderSource(folder).read(0).image, max_pixels=10**6).decode(1.0)
    assert not (tmp_path / "started").exists()


def test_images_beside_class_folders_say_why_there_are_no_labels(pets, tmp_path, caplog):
    folder = tmp_path / "pets"
    shutil.copytree(pets, folder)
    shutil.copy(folder / "cat" / "0.jpg", folder / "preview.png")
    assert set(FolderSource(folder).labels) == {-1}
    assert "preview.png" in caplog.text
