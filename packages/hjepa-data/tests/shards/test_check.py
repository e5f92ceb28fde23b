"""Damage of every kind is injected into real tars and has to be found, and nothing else."""

import io
import json
import os
import pickle
import struct
import tarfile
import zlib

import pytest
from PIL import Image

from hjepa_data import DataError, ShardSource, write_shards
from hjepa_data.shards.check import PICKLES, CheckConfig, check_shard, check_shards
from hjepa_data.shards.index import index_path, index_shard


def write_tar(path, members, links=(), kind=tarfile.SYMTYPE):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for name in links:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.jpg"
            tar.addfile(info)
    return path


def check(shard, **settings):
    return check_shard(shard, CheckConfig(**settings))


def found(report):
    assert all("\n" not in str(damage) and str(damage).startswith(f"{report.shard}: ") for damage in report.damage)
    return [(damage.member, damage.kind) for damage in report.damage]


def flip(path, position, count=1):
    data = bytearray(path.read_bytes())
    data[position : position + count] = bytes(255 - byte for byte in data[position : position + count])
    stat = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def change_index(shard, **fields):
    raw = json.loads(index_path(shard).read_text())
    index_path(shard).write_text(json.dumps(raw | fields))


@pytest.fixture
def shard(tmp_path, jpeg):
    (path,) = write_shards([(jpeg(n, kind="PNG" if n == 3 else "JPEG"), n) for n in range(6)], tmp_path)
    return path


def name(number):
    return f"{number:09d}.jpg"


def test_nothing_wrong(shard):
    report = check(shard)
    assert found(report) == []
    assert (report.members, report.images, report.labelled, report.pickles) == (12, 6, 6, 0)
    assert (report.index, report.checksums, report.num_bytes) == ("fits", True, shard.stat().st_size)
    index_path(shard).unlink()
    assert (check(shard).index, found(check(shard))) == ("none", [])


def test_truncated_tar(shard):
    cut = int(index_shard(shard).offsets[4]) + 20
    os.truncate(shard, cut)
    report = check(shard)
    assert found(report) == [("", "tar"), ("", "index"), ("", "sha256")]
    assert f"truncated at byte {cut}: member '000000004.jpg'" in str(report.damage[0])
    assert "lacks 2 of the 6 samples of its index: '000000004', '000000005'" in str(report.damage[1])
    assert report.images == 4


def test_damaged_header(shard):
    flip(shard, int(index_shard(shard).offsets[2]) - 512, 4)
    index_path(shard).unlink()
    assert found(check(shard)) == [("", "tar")]


def test_tar_behind_a_tar(shard):
    index_path(shard).unlink()
    data = shard.read_bytes()
    for behind, what in ((data, f"another tar at byte {len(data)}"), (b"signed", "content behind the end mark")):
        shard.write_bytes(data + behind)
        report = check(shard)
        assert found(report) == [("", "tar")]
        assert what in str(report.damage[0])


def test_flipped_byte_of_a_jpeg_is_found_by_its_checksum(shard):
    index = index_shard(shard)
    flip(shard, int(index.offsets[1] + index.sizes[1]) - 40)
    report = check(shard)
    assert found(report) == [("", "sha256"), (name(1), "changed")]
    # It still decodes, which is why an index has checksums.
    index_path(shard).unlink()
    assert found(check(shard)) == []


def test_flipped_bytes_of_a_png_are_found_without_an_index(shard):
    index = index_shard(shard)
    flip(shard, int(index.offsets[3] + index.sizes[3] // 2), 8)
    index_path(shard).unlink()
    assert [member for member, _ in found(check(shard))] == ["000000003.png"]


def test_flipped_byte_of_a_label(shard):
    index = index_shard(shard)
    # It lies before its image: content and header of a block each.
    flip(shard, int(index.offsets[2]) - 1024)
    assert ("", "sha256") in found(check(shard))
    assert (name(2), "index") in found(check(shard))


def test_wrong_sha256(shard):
    change_index(shard, sha256="0" * 64)
    report = check(shard)
    assert found(report) == [("", "sha256")]
    assert "its index says 0000000000000000..." in str(report.damage[0])


def test_missing_wrong_and_extra_index_entries(shard):
    raw = json.loads(index_path(shard).read_text())
    columns = ("keys", "offsets", "sizes", "labels", "crc32")
    change_index(shard, **{column: raw[column][:2] + raw[column][3:] for column in columns})
    assert found(check(shard)) == [(name(2), "index")]
    # What the check is for: streams believe such an index.
    assert len(ShardSource(shard)) == 5
    change_index(shard, **raw)
    change_index(shard, labels=[0, 1, 2, 3, 9, 5], offsets=[512 * 9, *raw["offsets"][1:]])
    report = check(shard)
    assert found(report) == [(name(0), "index"), (name(4), "index")]
    assert "label 9, not 4" in str(report.damage[1])
    change_index(shard, **raw)
    change_index(shard, **{column: raw[column] + raw[column][:1] for column in columns[1:]}, keys=[*raw["keys"], "x"])
    assert "lacks 1 of the 7 samples of its index: 'x'" in str(check(shard).damage[0])


def test_damaged_and_stale_index(shard):
    for text in ("{", "[]", '{"format": "other"}', "\xff"):
        index_path(shard).write_text(text, encoding="latin-1")
        report = check(shard)
        assert (found(report), report.index) == ([("", "index")], "damaged")
    index_path(shard).unlink()
    index_path(shard).mkdir()
    assert found(check(shard)) == [("", "index")]


def test_another_time_is_no_damage(shard):
    os.utime(shard, (1, 1))
    report = check(shard)
    assert (found(report), report.index, report.checksums) == ([], "stale", True)


def png_header(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def test_images_of_every_kind_of_damage(tmp_path, jpeg):
    bomb = png_header(60_000, 60_000)
    jpeg_bomb = bytearray(jpeg(0))
    frame = jpeg_bomb.index(b"\xff\xc0")
    jpeg_bomb[frame + 5 : frame + 9] = b"\xff\xdc" * 2
    path = write_tar(
        tmp_path / "foreign.tar",
        [
            ("good.jpg", jpeg(0)),
            ("empty.jpg", b""),
            ("text.png", b"hello"),
            ("cut.jpg", jpeg(1, size=(200, 200))[:-300]),
            ("bomb.png", bomb),
            ("bomb2.jpg", bytes(jpeg_bomb)),
            ("twice.jpg", jpeg(2)),
            ("twice.jpg", jpeg(3)),
            ("new\nline.jpg", b""),
        ],
    )
    report = check(path)
    assert found(report) == [
        ("twice.jpg", "repeated"),
        ("empty.jpg", "empty"),
        ("text.png", "undecodable"),
        ("cut.jpg", "truncated"),
        ("bomb.png", "too_large"),
        ("bomb2.jpg", "too_large"),
        ("new\nline.jpg", "empty"),
    ]
    assert "60,000 x 60,000 pixels, more than 89,478,485" in str(report.damage[4])
    assert "65,500 x 65,500 pixels" in str(report.damage[5])
    assert report.damaged_members == 7


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_links_are_named(tmp_path, jpeg, kind):
    shard = write_tar(tmp_path / "a.tar", [("a.jpg", jpeg(1))], links=("b.jpg", "b.cls", "notes"), kind=kind)
    report = check(shard)
    assert found(report) == [("b.jpg", "link"), ("b.cls", "link")]
    assert "tar -h --hard-dereference" in report.damage[0].what
    assert (report.members, report.images) == (4, 1)
    assert index_shard(shard).keys == ["a"]
    with pytest.raises(DataError, match=r"holds no image among its 1 members, such as the link 'b\.jpg'"):
        index_shard(write_tar(tmp_path / "b.tar", [], links=("b.jpg",), kind=kind))


def test_limits(tmp_path, jpeg):
    path = write_tar(tmp_path / "a.tar", [("a.jpg", jpeg(0, size=(40, 32)))])
    assert found(check(path, max_pixels=40 * 32)) == []
    assert found(check(path, max_pixels=40 * 32 - 1)) == [("a.jpg", "too_large")]
    assert found(check(path, max_image_bytes=len(jpeg(0)) - 1)) == [("a.jpg", "too_large")]
    for field in ("workers", "max_pixels", "max_image_bytes"):
        with pytest.raises(ValueError, match=f"{field}=0"):
            CheckConfig(**{field: 0})


def test_every_pixel_is_decoded(tmp_path):
    """Damage in the last rows of a large image, in each format."""
    noise = Image.effect_noise((300, 300), 90)
    members = []
    for kind in ("PNG", "JPEG", "WEBP"):
        buffer = io.BytesIO()
        noise.save(buffer, format=kind)
        data = bytearray(buffer.getvalue())
        members.append((f"whole.{kind.lower()}", bytes(data)))
        members.append((f"cut.{kind.lower()}", bytes(data[:-60])))
        data[-60:-40] = bytes(255 - byte for byte in data[-60:-40])
        if kind == "PNG":
            members.append(("flipped.png", bytes(data)))
    report = check(write_tar(tmp_path / "a.tar", members))
    assert [member for member, _ in found(report)] == ["cut.png", "flipped.png", "cut.jpeg", "cut.webp"]


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_nothing_is_unpickled(tmp_path, jpeg):
    from hjepa_data.shards.cli import main

    ran = tmp_path / "ran"
    trap = pickle.dumps(Trap(str(ran)))
    pickle.loads(trap).close()
    assert ran.exists()
    ran.unlink()
    members = [("a.jpg", jpeg(0)), *((f"a.{ending}", trap) for ending in sorted(PICKLES)), ("b.cls", trap)]
    path = write_tar(tmp_path / "trap.tar", [*members, ("b.jpg", trap), ("c.pkl.jpg", trap)])
    assert {"pkl", "pyd", "pth"} <= PICKLES
    report = check(path)
    assert report.pickles == len(PICKLES)
    assert found(report) == [("b.jpg", "undecodable"), ("c.pkl.jpg", "undecodable")]
    source = ShardSource(path)
    assert (source.read(0).image, source.labels.tolist()) == (jpeg(0), [-1, -1, -1])
    assert main(["index", str(path)]) == 0
    assert main(["check", str(path), "--workers", "1"]) == 1
    assert main(["show", str(path), "--out", str(tmp_path / "a.html")]) == 0
    assert not ran.exists()


def test_unreadable_shards(tmp_path):
    assert found(check(tmp_path / "gone.tar")) == [("", "unreadable")]
    assert found(check(write_tar(tmp_path / "a.tar", [("a.txt", b"")]))) == [("", "no image")]
    (tmp_path / "zero.tar").write_bytes(b"")
    assert found(check(tmp_path / "zero.tar")) == [("", "tar"), ("", "no image")]


def test_reports_come_in_order_whatever_the_workers(tmp_path, jpeg):
    shards = write_shards([jpeg(n) for n in range(12)], tmp_path, samples_per_shard=2)
    os.truncate(shards[3], 2000)
    index_path(shards[1]).unlink()
    one, three = (list(check_shards(shards, CheckConfig(workers=workers))) for workers in (1, 3))
    assert one == three
    assert [report.shard for report in one] == shards
    assert [bool(report.damage) for report in one] == [False, False, False, True, False, False]
