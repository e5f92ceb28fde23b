"""Data sets of Hugging Face and torchvision, the real ones."""

import io
import itertools
import os
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from hjepa_data import (
    DataError,
    EvalConfig,
    FolderSource,
    HuggingFaceSource,
    MixtureSource,
    StreamConfig,
    TorchvisionSource,
    ViewGroup,
    WorkerConfig,
    write_shards,
)
from hjepa_data.shards.source import ShardSource
from hjepa_data.transforms.decode import SkipImageError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    datasets = pytest.importorskip("datasets")
vision = pytest.importorskip("torchvision.datasets")

PIXELS = np.random.default_rng(0).integers(0, 256, (13, 28, 28), dtype=np.uint8)


def mnist(root):
    """Write the files of torchvision's MNIST: 13 grey images, labels n % 10."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in ("train", "t10k"):
        shape = b"".join(side.to_bytes(4, "big") for side in PIXELS.shape)
        (raw / f"{name}-images-idx3-ubyte").write_bytes(b"\x00\x00\x08\x03" + shape + PIXELS.tobytes())
        labels = bytes(n % 10 for n in range(13))
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(b"\x00\x00\x08\x01" + (13).to_bytes(4, "big") + labels)
    return root


def test_rows_are_samples_by_their_numbers(rows, jpeg):
    source = HuggingFaceSource(rows)
    assert [source.read(n).image for n in range(31)] == [jpeg(n) for n in range(31)]
    assert source.labels.tolist() == [source.read(n).label for n in range(31)] == [n % 3 for n in range(31)]
    assert source.classes == ["cat", "dog", "emu"]
    assert (source.group_sizes.tolist(), source.locate(4)) == ([31], "row 4")
    for index in (-1, 31):
        with pytest.raises(IndexError):
            source.read(index)


def test_rows_that_were_chosen_and_formatted(rows, jpeg):
    source = HuggingFaceSource(rows.select([5, 3, 8]).with_format("torch"), group_size=2)
    assert [source.read(n).image for n in range(3)] == [jpeg(5), jpeg(3), jpeg(8)]
    assert source.labels.tolist() == [2, 0, 2]
    assert source.group_sizes.tolist() == [2, 1]


def test_rows_without_an_image_or_a_label_or_of_another_format(jpeg, tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg(4))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    images = [
        {"bytes": jpeg(0, kind="BMP"), "path": None},
        None,
        {"bytes": None, "path": str(tmp_path / "a.jpg")},
        {"bytes": None, "path": str(tmp_path / "gone.jpg")},
        {"bytes": b"junk", "path": None},
    ]
    source = HuggingFaceSource(
        datasets.Dataset.from_dict({"image": images, "label": [1, 0, None, 0, 1]}, features=features)
    )
    assert source.labels.tolist() == [1, 0, -1, 0, 1]
    bmp = np.asarray(Image.open(io.BytesIO(jpeg(0, kind="BMP"))))
    assert np.array_equal(np.asarray(source.read(0).image), bmp)
    assert source.read(2).image == jpeg(4)
    with pytest.raises(SkipImageError, match="empty"):
        source.read(1)
    with pytest.raises(SkipImageError, match="undecodable"):
        source.read(4)
    with pytest.raises(DataError, match=r"gone.jpg' of row 3 cannot be read: No such file"):
        source.read(3)


def test_columns_are_found_or_asked_for(rows):
    assert set(HuggingFaceSource(rows.remove_columns("kind")).labels.tolist()) == {-1}
    two = rows.add_column("coarse", [n % 2 for n in range(31)]).add_column("word", ["a", "b", "c"] * 10 + ["a"])
    assert HuggingFaceSource(two, label="coarse").labels.tolist() == [n % 2 for n in range(31)]
    fine = two.class_encode_column("word")
    for dataset, fields, words in (
        (two, {"label": "word"}, r"label='word': that column holds .*string, .*class_encode_column"),
        (two, {"label": "no"}, "label='no': no such column; allowed: pixels, kind, coarse, word"),
        (two, {"image": "coarse"}, "image='coarse': that column holds no images; allowed: pixels"),
        (fine, {}, "2 columns are labels: give label=, one of kind, word"),
        (rows.remove_columns("pixels"), {}, "0 columns are images"),
        (rows.select([]), {}, "no rows"),
        (datasets.DatasetDict({"train": rows, "test": rows}), {}, "with the splits train, test; give one of them"),
        (rows.to_iterable_dataset(), {}, "IterableDataset: a source is a datasets.Dataset"),
    ):
        with pytest.raises(DataError, match=words) as caught:
            HuggingFaceSource(dataset, **fields)
        assert "\n" not in str(caught.value)


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"need the package 'datasets' .*: pip install 'hjepa-data\[datasets\]'"):
        HuggingFaceSource([])


def test_image_folders_are_read_file_by_file(pets, jpeg):
    dataset = vision.ImageFolder(pets)
    source = TorchvisionSource(dataset)
    assert [source.locate(n) for n in range(31)] == [path for path, _ in dataset.samples]
    number = {jpeg(n): n for n in range(31)}
    found = [source.read(n) for n in range(31)]
    assert all(isinstance(sample.image, bytes) and sample.label == number[sample.image] % 3 for sample in found)
    assert source.classes == ["cat", "dog", "emu"]
    pixels = TorchvisionSource(vision.ImageFolder(pets, loader=lambda path: Image.open(path).convert("L")))
    assert pixels.read(3).image.mode == "L"


def test_pixels_in_memory(tmp_path):
    source = TorchvisionSource(vision.MNIST(mnist(tmp_path)))
    assert source.labels.tolist() == [n % 10 for n in range(13)]
    assert source.classes[3] == "3 - three"
    (batch,) = EvalConfig(size=(28, 28), crop_fraction=1.0).build(source)
    assert np.array_equal(batch.views[0][:, 1].numpy(), PIXELS)
    assert (source.locate(2), source.group_sizes.tolist()) == ("MNIST[2]", [13])


class Scans:
    """A data set of somebody: one damaged image, labels nowhere but in the samples."""

    def __init__(self, folder, labels=range(5)):
        self.folder, self.given = folder, labels

    def __len__(self):
        return 5

    def __getitem__(self, index):
        image = Image.open(io.BytesIO((self.folder / f"{index}.png").read_bytes()))
        image.load()
        return image, self.given[index]


def test_data_sets_of_others(tmp_path):
    for number in range(5):
        Image.fromarray(PIXELS[number]).save(tmp_path / f"{number}.png")
    source = TorchvisionSource(Scans(tmp_path, [4, None, 2, 1, 0]))
    assert source.labels.tolist() == [4, -1, 2, 1, 0]
    assert TorchvisionSource(Scans(tmp_path), labels=[-1] * 5).labels.tolist() == [-1] * 5
    (tmp_path / "1.png").write_bytes(b"no image")
    (tmp_path / "3.png").unlink()
    with pytest.raises(SkipImageError, match="undecodable"):
        source.read(1)
    with pytest.raises(DataError, match=r"Scans\[3\] cannot be read"):
        source.read(3)
    (tmp_path / "3.png").write_bytes((tmp_path / "2.png").read_bytes())
    stream = EvalConfig(size=(28, 28)).build(source)
    assert torch.cat([batch.sample for batch in stream]).tolist() == [0, 2, 3, 4]
    assert stream.skipped == {"undecodable": 1}


class Tensors(Scans):
    def __getitem__(self, index):
        return torch.zeros(3, 8, 8), 0


def test_data_sets_that_are_no_source(tmp_path):
    Image.fromarray(PIXELS[0]).save(tmp_path / "0.png")
    for dataset, words in (
        (vision.FakeData(3, transform=lambda image: image), "FakeData has transforms, but streams cut their own views"),
        (Tensors(tmp_path), r"Tensors\[0\] holds a Tensor, where a source needs a PIL image"),
        (Scans(tmp_path, [torch.zeros(4)] * 5), "labels of the Scans are no class numbers"),
        (iter([]), "has no numbered samples"),
    ):
        with pytest.raises(DataError, match=words) as caught:
            TorchvisionSource(dataset)
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="labels of the FakeData are no class numbers, one a sample"):
        TorchvisionSource(vision.FakeData(3, (3, 8, 8)), labels=[1, 2])


@pytest.fixture
def everything(rows, pets, tmp_path, jpeg):
    """One source of each kind: 31 + 31 + 31 + 13 + 20 samples."""
    shards = ShardSource(write_shards([(jpeg(n), n) for n in range(20)], tmp_path / "shards", samples_per_shard=6))
    sources = [
        HuggingFaceSource(rows),
        FolderSource(pets),
        TorchvisionSource(vision.ImageFolder(pets)),
        TorchvisionSource(vision.MNIST(mnist(tmp_path))),
        shards,
    ]
    return MixtureSource(sources, [1, 1, 1, 2, 1])


def streamed(source, steps, **workers):
    config = StreamConfig(
        global_batch_size=10, window_shards=2, views=(ViewGroup(size=(8, 8)),), workers=WorkerConfig(**workers)
    )
    stream = config.build(source, seed=3)
    batches = list(itertools.islice(stream, steps))
    stream.close()
    return batches


@pytest.mark.parametrize("start_method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_read_every_source(everything, start_method):
    alone = streamed(everything, 12)
    assert set(everything.source_of(torch.cat([batch.sample for batch in alone]).numpy()).tolist()) == set(range(5))
    workers = streamed(everything, 12, count=2 if start_method == "fork" else 1, start_method=start_method)
    for one, two in zip(alone, workers, strict=True):
        assert torch.equal(one.views[0], two.views[0])
        assert torch.equal(one.sample, two.sample)
        assert torch.equal(one.labels, two.labels)


@pytest.mark.parametrize("world", [1, 3, 200])
def test_evaluation_shows_each_sample_of_every_source_once(everything, world):
    for source in (everything, *everything.sources):
        seen, sizes = [], []
        for rank in range(world):
            stream = EvalConfig(batch_size=50, size=(8, 8)).build(source, rank=rank, world_size=world)
            parts = [batch.sample for batch in stream]
            sizes.append(sum(map(len, parts)))
            assert (len(parts), sizes[-1]) == (len(stream), stream.num_samples)
            seen += [int(n) for part in parts for n in part]
        assert seen == list(range(len(source)))
        assert max(sizes) - min(sizes) <= 1


def test_rows_on_the_disk_are_not_copied_into_workers(rows, tmp_path):
    import pickle

    rows.save_to_disk(tmp_path / "rows")
    source = HuggingFaceSource(datasets.load_from_disk(str(tmp_path / "rows")))
    assert len(pickle.dumps(source)) < sum(os.path.getsize(p) for p in (tmp_path / "rows").glob("*.arrow")) / 3


def test_class_numbers_of_any_integers(rows):
    labels = datasets.Features({"pixels": datasets.Image(), "kind": datasets.Value("uint8")})
    images = rows.cast_column("pixels", datasets.Image(decode=False))["pixels"][:3]
    source = HuggingFaceSource(
        datasets.Dataset.from_dict({"pixels": images, "kind": [200, 2, None]}, features=labels), label="kind"
    )
    assert source.labels.tolist() == [200, 2, -1]


class FirstDamaged:
    targets = (0, 1)

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return Image.open(io.BytesIO(self.data[index])).convert("RGB"), self.targets[index]


def test_a_damaged_first_image_is_left_out_like_any_other(jpeg):
    source = TorchvisionSource(FirstDamaged([jpeg(0, size=(200, 200))[:300], jpeg(1)]))
    with pytest.raises(SkipImageError):
        source.read(0)
    assert source.read(1).label == 1
