"""The index with its checksums: written once, kept, renewed, verified."""

import hashlib
import json
import multiprocessing
import os
import resource
import zlib

import pytest

from hjepa_data import DataError, ShardSource, write_shards
from hjepa_data.shards.index import IndexState, index_path, index_shard, load_index, refresh_index, write_index


@pytest.fixture
def shard(tmp_path, jpeg):
    (path,) = write_shards([(jpeg(n), n if n % 2 else 0) for n in range(6)], tmp_path)
    return path


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 0xFF
    stat = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_content(shard, jpeg):
    raw = json.loads(index_path(shard).read_text())
    assert raw["format"] == "hjepa-shard-index-1"
    assert raw["sha256"] == hashlib.sha256(shard.read_bytes()).hexdigest()
    assert raw["crc32"] == [zlib.crc32(jpeg(n)) for n in range(6)]
    assert (raw["num_samples"], raw["num_labelled"], raw["size"]) == (6, 6, shard.stat().st_size)
    data = shard.read_bytes()
    images = [data[o : o + s] for o, s in zip(raw["offsets"], raw["sizes"], strict=True)]
    assert images == [jpeg(n) for n in range(6)]


def test_an_index_that_fits_is_kept(shard):
    before = index_path(shard).read_bytes(), index_path(shard).stat().st_mtime_ns
    _, state = refresh_index(shard)
    assert state == IndexState.KEPT
    assert (index_path(shard).read_bytes(), index_path(shard).stat().st_mtime_ns) == before


def test_new_renewed_and_overwritten(shard):
    path = index_path(shard)
    path.unlink()
    assert refresh_index(shard)[1] == IndexState.NEW
    good = path.read_text()
    # Of the first writers: no checksums.
    old = {name: value for name, value in json.loads(good).items() if name not in {"sha256", "crc32"}}
    for damaged in (json.dumps(old), "{", "[]", json.dumps(json.loads(good) | {"offsets": [1]})):
        path.write_text(damaged)
        assert refresh_index(shard)[1] == IndexState.RENEWED
        assert path.read_text() == good
    # A copy of the same bytes at another time.
    os.utime(shard, (1, 1))
    assert refresh_index(shard)[1] == IndexState.RENEWED
    assert load_index(shard).stamp == (shard.stat().st_size, 1)
    assert refresh_index(shard, overwrite=True)[1] == IndexState.RENEWED


def test_damage_is_not_blessed(shard):
    before = index_path(shard).read_text()
    flip(shard, int(index_shard(shard).offsets[2]) + 400)
    os.utime(shard, (1, 1))
    with pytest.raises(DataError, match="differs from the checksum of its index"):
        refresh_index(shard)
    assert index_path(shard).read_text() == before
    assert refresh_index(shard, overwrite=True)[1] == IndexState.RENEWED
    assert load_index(shard).index.sha256 == hashlib.sha256(shard.read_bytes()).hexdigest()


def test_old_index_without_checksums_is_read(shard):
    raw = json.loads(index_path(shard).read_text())
    for name in ("sha256", "crc32", "num_samples", "num_labelled"):
        del raw[name]
    # The key tells the index from a scan.
    raw["keys"][0] = "renamed"
    index_path(shard).write_text(json.dumps(raw))
    assert index_shard(shard).keys[0] == "renamed"


def test_verify_on_use(shard, tmp_path):
    assert len(ShardSource(shard, verify=True)) == 6
    flip(shard, int(index_shard(shard).offsets[2]) + 400)
    # Size and time are the same: only a checksum tells.
    assert len(ShardSource(shard)) == 6
    with pytest.raises(DataError, match="is not what was indexed") as caught:
        ShardSource(shard, verify=True)
    assert "\n" not in str(caught.value)
    index_path(shard).unlink()
    with pytest.raises(DataError, match="has no checksum; 'hjepa-shards index"):
        ShardSource(shard, verify=True)
    index_path(shard).write_text("{")
    with pytest.raises(DataError, match="its index is damaged"):
        ShardSource(shard, verify=True)


def test_a_shard_that_is_cut_off_gets_no_index(shard):
    index_path(shard).unlink()
    os.truncate(shard, 3000)
    with pytest.raises(DataError, match="truncated at byte 3000"):
        write_index(shard)
    assert not index_path(shard).exists()


def test_an_index_that_overflows_is_damaged(shard):
    raw = json.loads(index_path(shard).read_text())
    for fields in ({"sizes": [2**63 - 1] * 6}, {"size": 2**70}):
        index_path(shard).write_text(json.dumps(raw | fields))
        with pytest.raises(ValueError, match="is damaged"):
            load_index(shard)
        assert len(ShardSource(shard)) == 6


def test_processes_that_index_the_same_shard_do_not_share_a_file(shard, monkeypatch):
    """Another process, between the writing of the index and its renaming, writes and renames its own."""
    replace, names = os.replace, []

    def slow(old, new):
        names.append(old.name)
        if len(names) == 1:
            child = multiprocessing.get_context("fork").Process(target=write_index, args=(shard,))
            child.start()
            child.join(120)
            assert child.exitcode == 0
        replace(old, new)

    monkeypatch.setattr(os, "replace", slow)
    write_index(shard)
    assert len(load_index(shard).index) == 6


def test_a_full_disk_leaves_no_half_index(shard):
    index_path(shard).unlink()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_index(shard)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(shard.parent.iterdir()) == [shard]
