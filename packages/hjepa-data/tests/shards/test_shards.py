"""Write, index and read, against Python's tarfile and against webdataset itself."""

import hashlib
import io
import json
import os
import resource
import tarfile

import numpy as np
import pytest
from PIL import Image

from hjepa_data import DataError, ShardSource, ShardWriter, write_shards
from hjepa_data.shards.index import index_path, index_shard, scan_shard


def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def test_what_is_written_is_read(shards, jpeg):
    source = ShardSource(shards)
    assert len(source) == 53
    assert source.group_sizes.tolist() == [10, 10, 10, 10, 10, 3]
    for number in (0, 9, 10, 52, 31, 3):
        sample = source.read(number)
        assert sample.image == jpeg(number)
        assert sample.label == number % 7
    assert source.labels.tolist() == [n % 7 for n in range(53)]
    with pytest.raises(IndexError):
        source.read(53)


def test_webdataset_reads_our_shards(shards, jpeg):
    from webdataset.tariterators import group_by_keys, tar_file_iterator

    samples = []
    for shard in sorted(shards.glob("*.tar")):
        # WebDataset itself would leave the files open.
        with shard.open("rb") as file:
            samples += group_by_keys({**member, "__url__": str(shard)} for member in tar_file_iterator(file))
    assert [sample["jpg"] for sample in samples] == [jpeg(n) for n in range(53)]
    assert [int(sample["cls"]) for sample in samples] == [n % 7 for n in range(53)]


def test_same_samples_give_the_same_bytes(tmp_path, jpeg):
    digests = []
    for name in ("a", "b"):
        paths = write_shards([jpeg(n) for n in range(7)], tmp_path / name, samples_per_shard=3)
        assert [path.name for path in paths] == [f"train-00000{n}.tar" for n in range(3)]
        digests.append([hashlib.sha256(path.read_bytes()).hexdigest() for path in paths])
    assert digests[0] == digests[1]


def test_index_beside_the_shard_equals_a_scan(shards):
    for shard in shards.glob("*.tar"):
        stored, scanned = index_shard(shard), scan_shard(shard)
        assert index_path(shard).is_file()
        assert stored.keys == scanned.keys
        for name in ("offsets", "sizes", "labels"):
            assert getattr(stored, name).tolist() == getattr(scanned, name).tolist()


def test_stale_or_broken_index_is_not_believed(tmp_path, jpeg):
    (shard,) = write_shards([jpeg(n) for n in range(4)], tmp_path)
    good = index_path(shard).read_text()
    index_path(shard).write_text(good[:40])
    assert len(index_shard(shard)) == 4
    lie = json.loads(good) | {"offsets": [10**9] * 4}
    index_path(shard).write_text(json.dumps(lie))
    assert index_shard(shard).offsets.max() < 10**9
    index_path(shard).write_text(good)
    # Another shard in its place, with other content.
    write_shards([jpeg(n) for n in range(9)], tmp_path / "new")
    os.replace(tmp_path / "new" / "train-000000.tar", shard)
    assert len(index_shard(shard)) == 9


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_foreign_shards_of_every_tar_format(tmp_path, jpeg, kind):
    path = tmp_path / "foreign.tar"
    long = "folder/" * 12 + "sample" + "x" * (40 if kind != tarfile.USTAR_FORMAT else 4)
    with tarfile.open(path, "w", format=kind) as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        add(tar, "README", b"no sample")
        add(tar, "a.json", b"{}")
        add(tar, "a.left.JPG", jpeg(1))
        add(tar, "a.right.jpg", jpeg(2))
        add(tar, "b.cls", b" 12\n")
        add(tar, "b.webp", jpeg(3, kind="WEBP"))
        add(tar, "only.txt", b"no image")
        add(tar, f"{long}.png", jpeg(4, kind="PNG"))
        add(tar, f"{long}.cls", b"cat")
    source = ShardSource(path)
    assert [source.read(n).image for n in range(3)] == [jpeg(1), jpeg(3, kind="WEBP"), jpeg(4, kind="PNG")]
    assert source.labels.tolist() == [-1, 12, -1]
    assert scan_shard(path).keys == ["a", "b", long]


def test_truncated_tar_names_file_byte_and_samples(tmp_path, jpeg):
    (shard,) = write_shards([jpeg(n) for n in range(8)], tmp_path)
    index = scan_shard(shard)
    for cut, samples in (
        (int(index.offsets[5] + 20), 5),  # within the sixth image
        (int(index.offsets[5] - 300), 5),  # within its header
        (int(index.offsets[5] - 512), 5),  # between two members
    ):
        part = tmp_path / f"cut-{cut}.tar"
        part.write_bytes(shard.read_bytes()[:cut])
        with pytest.raises(DataError) as caught:
            ShardSource(part)
        message = str(caught.value)
        assert part.name in message
        assert f"truncated at byte {cut}" in message
        assert f"{samples} complete samples precede it" in message
        assert "\n" not in message
        kept = ShardSource(part, allow_truncated=True)
        assert [kept.read(n).image for n in range(len(kept))] == [jpeg(n) for n in range(samples)]


def test_damaged_and_empty_shards(tmp_path, jpeg):
    (shard,) = write_shards([jpeg(n) for n in range(4)], tmp_path)
    data = bytearray(shard.read_bytes())
    start = int(scan_shard(shard).offsets[2]) - 512
    data[start : start + 8] = b"\xff" * 8
    (tmp_path / "bad.tar").write_bytes(data)
    with pytest.raises(DataError, match=f"damaged at byte {start}.*2 complete samples"):
        ShardSource(tmp_path / "bad.tar")
    with tarfile.open(tmp_path / "texts.tar", "w") as tar:
        add(tar, "a.txt", b"hello")
    with pytest.raises(DataError, match="no image among its 1 members"):
        ShardSource(tmp_path / "texts.tar")
    (tmp_path / "zero.tar").write_bytes(b"")
    with pytest.raises(DataError, match="truncated at byte 0"):
        ShardSource(tmp_path / "zero.tar")


def test_a_shard_that_vanishes_or_shrinks_is_reported(tmp_path, jpeg):
    (shard,) = write_shards([jpeg(n) for n in range(4)], tmp_path)
    source = ShardSource(shard)
    os.truncate(shard, 600)
    with pytest.raises(DataError, match="changed while in use"):
        source.read(3)
    other = ShardSource(write_shards([jpeg(0)], tmp_path / "b"))
    (tmp_path / "b" / "train-000000.tar").unlink()
    with pytest.raises(DataError, match="cannot be read: No such file"):
        other.read(0)


def test_few_files_stay_open(tmp_path, jpeg):
    paths = write_shards([jpeg(n) for n in range(100)], tmp_path, samples_per_shard=1)
    source = ShardSource(paths)
    for number in range(100):
        source.read(number)
    assert len(source._open) <= 64
    source.close()
    assert source.read(5).image == jpeg(5)


def test_pixels_are_stored_without_loss(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    source = ShardSource(write_shards([(pixels, 3), (Image.fromarray(pixels), 4)], tmp_path))
    for number in range(2):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(source.read(number).image))), pixels)
    assert source.labels.tolist() == [3, 4]


def test_writer_refuses_and_leaves_nothing_half_done(tmp_path, jpeg):
    with pytest.raises(DataError, match="no image"):
        write_shards([jpeg(0), b"GIF89a"], tmp_path)
    assert list(tmp_path.iterdir()) == []
    with ShardWriter(tmp_path) as writer:
        with pytest.raises(DataError, match="no dot"):
            writer.write(jpeg(0), key="a.b")
        writer.write(jpeg(0), key="a")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train-000000.tar", "train-000000.tar.index.json"]


def test_shards_that_are_there_are_not_mixed_with_new_ones(tmp_path, jpeg):
    write_shards([jpeg(n) for n in range(6)], tmp_path, samples_per_shard=2)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(DataError, match=r"train-000000\.tar' is there already; remove it"):
        write_shards([jpeg(9)], tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert write_shards([jpeg(9)], tmp_path, prefix="val") == [tmp_path / "val-000000.tar"]
    with ShardWriter(tmp_path, first=3) as writer:
        writer.write(jpeg(9))
    assert len(ShardSource(f"{tmp_path}/train-*.tar")) == 7


def test_shard_size_in_bytes(tmp_path, jpeg):
    paths = write_shards([jpeg(n) for n in range(30)], tmp_path, max_bytes=20_000)
    assert len(paths) > 2
    assert all(path.stat().st_size >= 20_000 for path in paths[:-1])


def tar_of(path, members, **options):
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members:
            add(tar, name, data)
    return path


def test_the_first_image_and_the_first_label_of_a_key_belong_together(tmp_path, jpeg):
    members = [("a.jpg", jpeg(1)), ("a.CLS", b"1"), ("b.jpg", jpeg(2)), ("a.jpg", jpeg(3)), ("a.cls", b"2")]
    source = ShardSource(tar_of(tmp_path / "repeated.tar", members))
    assert source.read(0).image == jpeg(1)
    assert source.labels.tolist() == [1, -1]


def test_a_plain_extension_is_the_image_of_its_sample(tmp_path, jpeg):
    depth, photo = jpeg(7, kind="PNG"), jpeg(8)
    source = ShardSource(tar_of(tmp_path / "a.tar", [("x.depth.png", depth), ("x.jpg", photo), ("x.seg.png", depth)]))
    assert [source.read(number).image for number in range(len(source))] == [photo]
    source = ShardSource(tar_of(tmp_path / "b.tar", [("x.v2.png", depth), ("x.v1.jpg", photo)]))
    assert [source.read(number).image for number in range(len(source))] == [depth]


@pytest.mark.parametrize("kind", ["gnu", "pax"])
def test_a_sparse_member_is_refused_by_its_name(tmp_path, jpeg, kind):
    info = tarfile.TarInfo("GNUSparseFile.0/hole.jpg")
    data = jpeg(1)
    info.size = len(data)
    if kind == "gnu":
        info.type, info.name = b"S", "hole.jpg"
    else:
        info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "hole.jpg"}
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "whole.jpg", data)
        tar.addfile(info, io.BytesIO(data))
    with pytest.raises(DataError, match=r"'hole.jpg' without its holes.*--sparse; 1 complete samples precede it"):
        ShardSource(tmp_path / "a.tar")


def test_what_cannot_be_read_as_a_tar_is_one_line(tmp_path):
    (tmp_path / "a.tar").mkdir()
    with pytest.raises(DataError, match=r"a.tar' cannot be read: Is a directory"):
        scan_shard(tmp_path / "a.tar")


def test_a_key_is_written_once_into_a_shard(tmp_path, jpeg):
    with ShardWriter(tmp_path, samples_per_shard=2) as writer:
        writer.write(jpeg(0), key="a")
        with pytest.raises(DataError, match=r"key 'a': the shard has a sample of that key"):
            writer.write(jpeg(1), key="a")
        writer.write(jpeg(1), key="b")
        writer.write(jpeg(2), key="a")
    assert len(ShardSource(tmp_path)) == writer.num_samples == 3


@pytest.mark.parametrize("label", [-2, 1.0, "3", 10**18])
def test_a_label_that_no_reader_would_see_is_refused(tmp_path, jpeg, label):
    with ShardWriter(tmp_path) as writer:
        writer.write(jpeg(0), label=10**18 - 1)
        writer.write(jpeg(1), label=np.int64(4))
        writer.write(jpeg(2), label=-1)
        with pytest.raises(DataError, match=r"^label .* of sample 3 is no class number; allowed: 0 and more"):
            writer.write(jpeg(3), label=label)
    assert ShardSource(tmp_path).labels.tolist() == [10**18 - 1, 4, -1]


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((3, 8, 8), np.uint8),
        np.zeros((8, 8, 3), np.float32),
        np.zeros((8, 8), np.float32),
        Image.new("CMYK", (8, 8)),
        bytearray(b"\xff\xd8\xff"),
    ],
    ids=["channels first", "floats", "grey floats", "CMYK", "bytearray"],
)
def test_pixels_that_are_no_image_are_one_line(tmp_path, image):
    with ShardWriter(tmp_path) as writer, pytest.raises(DataError, match=r"sample 0 is no image \(.*\); allowed: "):
        writer.write(image)


def test_an_opened_image_is_written_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (20, 10)).save(buffer, format="JPEG", exif=exif)
    write_shards([Image.open(buffer)], tmp_path)
    assert Image.open(io.BytesIO(ShardSource(tmp_path).read(0).image)).size == (10, 20)


@pytest.mark.parametrize("sizes", [[2500] * 30, [9000, 9000]], ids=["in a member", "at the end"])
def test_a_full_disk_leaves_no_half_shard(tmp_path, jpeg, sizes):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The same as a full disk: the system refuses to write on.
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            write_shards((jpeg(number) + bytes(size) for number, size in enumerate(sizes)), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.__context__ is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_that_are_no_utf8_stay_apart(tmp_path, jpeg, kind):
    names = [os.fsdecode(name) for name in (b"caf\xe8.jpg", b"caf\xe9.jpg", b"x" * 120 + b"\xe8.jpg", b"\xe9.jpg")]
    members = [(name, jpeg(number)) for number, name in enumerate(names)]
    path = tar_of(tmp_path / "latin.tar", members, format=kind, encoding="utf-8", errors="surrogateescape")
    source = ShardSource(path)
    assert [source.read(number).image for number in range(len(source))] == [data for _, data in members]


def test_tars_that_were_joined_are_refused(tmp_path, jpeg):
    parts = [tar_of(tmp_path / f"{name}.tar", [(f"{name}.jpg", jpeg(1))]) for name in "ab"]
    joined = tmp_path / "joined.tar"
    joined.write_bytes(b"".join(part.read_bytes() for part in parts))
    begin = parts[0].stat().st_size
    with pytest.raises(DataError, match=rf"another tar at byte {begin}; 1 complete samples precede it"):
        ShardSource(joined)
    assert len(ShardSource(joined, allow_truncated=True)) == 1
    # What is behind the mark without being a tar hides no sample.
    joined.write_bytes(parts[0].read_bytes() + b"\0" * 100_000 + b"signed by me" * 100)
    assert len(ShardSource(joined)) == 1
