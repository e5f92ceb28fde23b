"""Shards behind a real HTTP server on this machine, and behind fsspec."""

import itertools
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hjepa_data import DataError, ShardSource, StreamConfig, ViewGroup, WorkerConfig
from hjepa_data.shards.cache import CacheConfig
from hjepa_data.shards.patterns import expand_locations
from hjepa_data.shards.remote import RemoteError, check_url, index_url, retry, shown

NAMES = "train-{000000..000005}.tar"


def drop_indexes(folder):
    for index in folder.glob("*.index.json"):
        index.unlink()


def kept(cache):
    return sorted(path.name for path in Path(cache.folder).glob("*.tar"))


def stream(source, workers=0):
    config = StreamConfig(
        global_batch_size=6, window_shards=2, views=(ViewGroup(size=(8, 8)),), workers=WorkerConfig(count=workers)
    )
    return config.build(source, seed=3)


def same(one, two):
    return torch.equal(one.views[0], two.views[0]) and torch.equal(one.sample, two.sample)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("indexed", [True, False])
def test_a_remote_stream_is_the_local_stream(served, shards, cache, workers, indexed):
    if not indexed:
        drop_indexes(served.folder)
    source = ShardSource(f"{served.url}/{NAMES}", cache=cache)
    # Counting needs the indexes only, where there are any.
    assert served.tars().total() == (0 if indexed else 6)
    local = ShardSource(shards)
    assert source.group_sizes.tolist() == local.group_sizes.tolist()
    assert source.labels.tolist() == local.labels.tolist()
    pairs = zip(
        itertools.islice(stream(source, workers), 19), itertools.islice(stream(local, workers), 19), strict=True
    )
    assert all(same(*pair) for pair in pairs)
    assert served.tars() == {f"train-00000{n}.tar": 1 for n in range(6)}
    # Another source of the same cache asks for nothing.
    before = served.requests.total()
    again = ShardSource(f"{served.url}/{NAMES}", cache=cache)
    assert again.read(52).image == local.read(52).image
    assert served.requests.total() == before


def test_it_fails_twice_then_works(served, cache, jpeg):
    served.fail = lambda name, number: 503 if number <= 2 else None
    source = ShardSource(f"{served.url}/train-000000.tar", cache=cache)
    assert source.read(3).image == jpeg(3)
    assert served.requests == {"train-000000.tar": 3, "train-000000.tar.index.json": 3}


def test_it_always_fails(served, cache):
    source = ShardSource(f"{served.url}/train-000000.tar?token=secret", cache=cache)
    served.fail = lambda name, number: 500
    with pytest.raises(DataError) as caught:
        source.read(0)
    message = str(caught.value)
    assert f"'{served.url}/train-000000.tar?...' cannot be fetched: HTTP 500" in message
    assert "(3 attempts)" in message
    assert "\n" not in message
    assert "secret" not in message
    assert served.tars().total() == 3
    # The stream says so too, whoever reads.
    for workers in (0, 1):
        with pytest.raises(DataError, match=r"cannot be fetched: HTTP 500 .*\(3 attempts\)"):
            next(stream(source, workers))


def test_what_is_not_there_is_asked_for_once(served, cache):
    with pytest.raises(DataError, match=r"gone.tar' cannot be fetched: HTTP 404 .*\(1 attempt\)"):
        ShardSource(f"{served.url}/gone.tar", cache=cache)
    assert served.requests == {"gone.tar": 1, "gone.tar.index.json": 1}


@pytest.mark.parametrize("name", ["pets/caf\u00e9.tar", "my pets/a.tar"])
def test_a_url_that_is_not_encoded_is_named(served, cache, name):
    with pytest.raises(DataError, match=rf"{name}.* cannot be fetched: .*\(1 attempt\)"):
        ShardSource(f"{served.url}/{name}", cache=cache)


def test_nobody_listens(served, cache):
    served.close()
    with pytest.raises(DataError, match=r"ConnectionRefusedError.*\(3 attempts\)"):
        ShardSource(f"{served.url}/train-000000.tar", cache=cache)
    served.close = lambda: None


def test_a_server_that_falls_silent(served, cache, jpeg):
    source = ShardSource(f"{served.url}/train-000000.tar", cache=replace(cache, timeout=0.5, attempts=10))
    served.stall = "train-000000.tar"
    assert source.read(3).image == jpeg(3)
    # A machine that is busy may be silent once more.
    assert served.tars().total() >= 2


def test_redirects_stay_on_http(served, cache):
    served.fail = lambda name, number: "redirect"
    with pytest.raises(DataError, match="cannot be fetched: HTTP 302"):
        ShardSource(f"{served.url}/train-000000.tar", cache=cache)


@pytest.mark.parametrize("indexed", [True, False])
def test_a_body_that_ends_early_is_never_kept(served, cache, indexed, jpeg):
    if not indexed:
        drop_indexes(served.folder)
    served.cut["train-000000.tar"] = (0, 3000)
    with pytest.raises(DataError, match=r"ended after 3000 of \d+ bytes \(3 attempts\)"):
        ShardSource(f"{served.url}/train-000000.tar", cache=cache).read(0)
    assert kept(cache) == []
    assert list(Path(cache.folder).glob("*.part")) == []
    # Without a length from the server the index tells, or else the tar itself.
    served.cut["train-000000.tar"] = (None, 3000)
    with pytest.raises(DataError, match="ended after 3000 of" if indexed else "train-000000.tar' is truncated"):
        ShardSource(f"{served.url}/train-000000.tar", cache=cache).read(0)
    assert kept(cache) == []
    if not indexed:
        some = ShardSource(f"{served.url}/train-000000.tar", cache=cache, allow_truncated=True)
        assert some.read(0).image == jpeg(0)
    served.cut["train-000000.tar"] = (None, None)
    assert ShardSource(f"{served.url}/train-000000.tar", cache=cache).read(9).image == jpeg(9)


def test_other_bytes_than_those_of_the_index(served, cache):
    path = served.folder / "train-000000.tar"
    source = ShardSource(f"{served.url}/train-000000.tar", cache=cache)
    good = path.read_bytes()
    path.write_bytes(good[:-1] + b"x")
    with pytest.raises(DataError, match=r"train-000000.tar' cannot be fetched: sha256 .* in its index"):
        source.read(0)
    assert kept(cache) == []
    assert served.tars().total() == 1
    path.write_bytes(good + b"x")
    with pytest.raises(DataError, match=f"it has {len(good) + 1} bytes, but {len(good)} in its index"):
        source.read(0)
    with pytest.raises(DataError, match="in its index"):
        ShardSource(f"{served.url}/train-000000.tar", cache=cache, verify=True)
    path.write_bytes(good)
    ShardSource(f"{served.url}/train-000000.tar", cache=cache, verify=True).close()
    # Bytes that changed in the cache are seen when verified, and fetched again.
    (name,) = kept(cache)
    (Path(cache.folder) / name).write_bytes(good[:-1] + b"x")
    ShardSource(f"{served.url}/train-000000.tar", cache=cache, verify=True)
    assert (Path(cache.folder) / name).read_bytes() == good


def test_a_page_instead_of_an_index(served, cache, jpeg):
    (served.folder / "train-000001.tar.index.json").write_text("<html>Not found</html>")
    source = ShardSource(f"{served.url}/train-000001.tar", cache=cache)
    assert source.read(0).image == jpeg(10)
    assert served.tars().total() == 1


def test_an_index_that_ends_early_is_asked_for_again(served, cache):
    name = "train-000001.tar.index.json"
    served.cut[name] = (0, 100)
    with pytest.raises(
        DataError, match=r"index.json' cannot be fetched: it ended after 100 of \d+ bytes \(3 attempts\)"
    ):
        ShardSource(f"{served.url}/train-000001.tar", cache=cache)
    assert served.requests == {name: 3}


def test_resume_fetches_no_shard_that_was_consumed(served, shards, cache, tmp_path):
    source = ShardSource(f"{served.url}/{NAMES}", cache=cache)
    first = stream(source)
    windows = [set(window.tolist()) for _, window in first._order.windows_from(0, 3)]
    per_window = [sum(int(source.group_sizes[n]) for n in window) for window in windows]
    done = -(-per_window[0] // 6)
    for _ in range(done):
        next(first)
    state = first.state_dict()
    served.requests.clear()
    cold = CacheConfig(folder=str(tmp_path / "cold"), first_wait=0.001)
    resumed = stream(ShardSource(f"{served.url}/{NAMES}", cache=cold))
    resumed.load_state_dict(state)
    local = stream(ShardSource(shards))
    local.load_state_dict(state)
    # What is left of the second window, and the third one, of this epoch.
    left = (sum(per_window) - done * 6) // 6
    assert all(same(next(resumed), next(local)) for _ in range(min(2, left)))
    consumed = {f"train-00000{n}.tar" for n in windows[0]}
    assert not consumed & set(served.tars())
    assert served.tars()


def test_file_and_memory_through_fsspec(shards, cache, jpeg):
    import fsspec

    source = ShardSource(f"file://{shards}/train-00000[0-1].tar", cache=cache)
    assert source.group_sizes.tolist() == [10, 10]
    assert source.read(15).image == jpeg(15)
    memory = fsspec.filesystem("memory")
    for shard in shards.glob("train-00000[45].tar"):
        memory.pipe(f"/pets/{shard.name}", shard.read_bytes())
    try:
        for pattern in ("memory://pets/", "memory://pets/train-*.tar", "memory://pets/train-{000004..000005}.tar"):
            source = ShardSource(pattern, cache=cache)
            assert source.read(12).image == jpeg(52)
        with pytest.raises(DataError, match="no shard matches 'memory://pets/val"):
            ShardSource("memory://pets/val-*.tar", cache=cache)
        with pytest.raises(DataError, match=r"memory://pets/no.tar' cannot be fetched: no such file \(1 attempt\)"):
            ShardSource("memory://pets/no.tar", cache=cache)
    finally:
        memory.rm("/pets", recursive=True)


def test_a_store_that_does_not_list_its_files_is_given_up(cache, monkeypatch):
    import asyncio

    from fsspec.asyn import AsyncFileSystem
    from fsspec.registry import _registry

    class Silent(AsyncFileSystem):
        protocol = "s3"
        asked = threading.Semaphore(0)

        async def _info(self, path, **kwargs):
            Silent.asked.release()
            await asyncio.sleep(60)

    monkeypatch.setitem(_registry, "s3", Silent)
    with pytest.raises(DataError, match=r"'s3://bucket/' cannot be fetched: FSTimeoutError \(2 attempts\)"):
        ShardSource("s3://bucket/", cache=replace(cache, timeout=0.5, attempts=2))
    assert [Silent.asked.acquire(timeout=seconds) for seconds in (60, 60, 0)] == [True, True, False]


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs")])
def test_a_missing_package_is_named(cache, scheme, package, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, package, None)
    for pattern in (f"{scheme}://bucket/a.tar", f"{scheme}://bucket/*.tar"):
        with pytest.raises(
            DataError, match=f"{scheme}:// needs the package {package}.*pip install {package}"
        ) as caught:
            ShardSource(pattern, cache=cache)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("ftp://host/a.tar", "no URL of a shard"),
        ("simplecache::s3://host/a.tar", "no URL of a shard"),
        ("s3://host/a.tar::http://host", "no URL of a shard"),
        ("http://host/train-*.tar", "http lists no files"),
        ("https://host/train-[0-9].tar", "http lists no files"),
        ("http://host/folder/", "http lists no files"),
        ("http://host/a.tar.gz?x=1", "compressed"),
        ("s3://host/a.tgz", "compressed"),
        ("http://host/all.txt", "list files"),
        ("http://me:secret@host/a.tar", "a user in a URL"),
    ],
)
def test_urls_that_are_refused(url, words, tmp_path):
    (tmp_path / "list.txt").write_text(f"{url}\n")
    for pattern in (url, [url], tmp_path / "list.txt"):
        with pytest.raises(DataError, match=words) as caught:
            expand_locations(pattern)
        assert "secret" not in str(caught.value)
        assert "\n" not in str(caught.value)


def test_urls_that_are_allowed():
    for url in ("http://[::1]:80/a.tar", "http://h/a?b=*&c=[1]", "s3://b/a?.tar"):
        check_url(url)
    assert index_url("http://h/a.tar?x=1") == "http://h/a.tar.index.json?x=1"
    assert index_url("s3://b/a.tar") == "s3://b/a.tar.index.json"
    assert shown("https://u:p@h/a.tar?x=1") == "https://h/a.tar?..."


def test_pauses_double_and_differ(monkeypatch):
    from hjepa_data.shards import remote

    pauses = {}
    for url in ("http://a", "http://b"):
        slept = pauses[url] = []
        monkeypatch.setattr(remote.time, "sleep", slept.append)

        def action():
            raise remote.RemoteError("no", passing=True)

        with pytest.raises(DataError, match=r"no \(9 attempts\)"):
            retry(action, url, attempts=9, first_wait=1.0)
        assert len(slept) == 8
        for k, pause in enumerate(slept):
            full = min(30.0, 2.0**k)
            assert full / 2 <= pause < full
    assert pauses["http://a"] != pauses["http://b"]


def test_a_thousand_attempts(monkeypatch):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)

    def fails():
        raise RemoteError("busy", passing=True)

    with pytest.raises(DataError, match=r"busy \(1100 attempts\)"):
        retry(fails, "http://host/a.tar", attempts=1100, first_wait=0.5)
    assert max(waits) <= 30
