"""The cache: one download for all processes, a bound, leases, and nothing half done."""

import fcntl
import itertools
import multiprocessing
import os
import pickle
import resource
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from hjepa_data import DataError, ShardSource, StreamConfig, ViewGroup
from hjepa_data.shards.cache import CacheConfig, ShardCache

NAMES = "train-{000000..000005}.tar"
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


def start(function, *args):
    process = multiprocessing.get_context("fork").Process(target=function, args=args)
    process.start()
    return process


def read_all(pattern, cache, out=None):
    source = ShardSource(pattern, cache=cache)
    images = [source.read(n).image for n in range(len(source))]
    source.close()
    if out is not None:
        out.put(images)


def used(cache):
    total = 0
    with open(Path(cache.folder) / "room.lock", "a") as lock:
        # Nothing is reserved and nothing gets its name meanwhile.
        fcntl.flock(lock, fcntl.LOCK_EX)
        for pattern in ("*.tar", "*.part"):
            for path in Path(cache.folder).glob(pattern):
                with suppress(FileNotFoundError):
                    total += path.stat().st_size
    return total


def is_locked(path):
    with open(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def room_for(count, cache, served):
    size = max(path.stat().st_size for path in served.folder.glob("*.tar"))
    return CacheConfig(folder=cache.folder, max_bytes=count * size, first_wait=0.001, attempts=3, timeout=60.0)


@pytest.mark.parametrize("indexed", [True, False])
def test_three_processes_fetch_each_shard_once(served, cache, jpeg, indexed):
    if not indexed:
        for index in served.folder.glob("*.index.json"):
            index.unlink()
    served.delay = 0.03
    out = multiprocessing.get_context("fork").Queue()
    processes = [start(read_all, f"{served.url}/{NAMES}", cache, out) for _ in range(3)]
    found = [out.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    assert found == [[jpeg(n) for n in range(53)]] * 3
    assert served.tars() == {f"train-00000{n}.tar": 1 for n in range(6)}


def test_threads_of_a_process_fetch_a_shard_once(served, cache):
    source = ShardSource(f"{served.url}/train-000000.tar", cache=cache)
    served.delay = 0.05
    threads = [threading.Thread(target=source.read_ahead, args=([0],)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert served.tars().total() == 1


def test_as_much_is_read_ahead_as_the_cache_holds(served, cache):
    source = ShardSource(f"{served.url}/{NAMES}", cache=room_for(3, cache, served))
    source.read_ahead([4, 2, 0, 1, 3])
    assert served.tars() == {f"train-00000{n}.tar": 1 for n in (4, 2, 0)}


@pytest.mark.parametrize(("workers", "room"), [(1, 3), (3, 2)])
def test_the_bound_holds_and_the_stream_is_right(served, shards, cache, workers, room):
    small = room_for(room, cache, served)
    config = StreamConfig(global_batch_size=6, window_shards=5, views=(ViewGroup(size=(8, 8)),))
    local = list(itertools.islice(config.build(ShardSource(shards), seed=3), 18))
    out = multiprocessing.get_context("fork").Queue()

    def run():
        torch.set_num_threads(1)
        source = ShardSource(f"{served.url}/{NAMES}", cache=small)
        # Else every shard stays open from its first sample on.
        batches, highest = [], 0
        for batch in itertools.islice(config.build(source, seed=3), 18):
            source.close()
            highest = max(highest, used(small))
            batches.append((batch.views[0].numpy(), batch.sample.tolist()))
        out.put((batches, highest))

    processes = [start(run) for _ in range(workers)]
    found = [out.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    for batches, highest in found:
        assert 0 < highest <= small.max_bytes
        for (view, sample), batch in zip(batches, local, strict=True):
            assert sample == batch.sample.tolist()
            assert (view == batch.views[0].numpy()).all()
    # Not everything fits, so something was deleted and fetched anew.
    assert served.tars().total() > 6
    assert used(small) <= small.max_bytes


def test_shards_used_longest_ago_go_first(served, cache):
    small = room_for(3, cache, served)
    source = ShardSource(f"{served.url}/{NAMES}", cache=small)
    for number in (0, 10, 20, 0, 30):
        source.read(number)
        source.close()
        time.sleep(0.02)  # the times of files go by ticks of up to 10 ms
    served.requests.clear()
    for number in (0, 20, 30):
        source.read(number)
        source.close()
    assert served.tars() == {}
    source.read(10)
    assert served.tars() == {"train-000001.tar": 1}


@pytest.mark.parametrize("was_there", [False, True])
def test_shards_that_are_read_are_deleted_last_and_stay_readable(served, cache, jpeg, was_there):
    small = room_for(3, cache, served)
    if was_there:
        read_all(f"{served.url}/train-000000.tar", small)
    reader = ShardSource(f"{served.url}/{NAMES}", cache=small)
    reader.read(0)
    other = ShardSource(f"{served.url}/{NAMES}", cache=small)
    for number in (10, 20, 30, 40):
        other.read(number)
        other.close()
    served.requests.clear()
    # The oldest, but leased.
    ShardSource(f"{served.url}/train-000000.tar", cache=small).read(0)
    assert served.tars() == {}
    # All are leased now: the bound goes before the leases, and open files outlive their names.
    for number in (10, 20, 30, 40, 50):
        reader.read(number)
    assert used(small) <= small.max_bytes
    assert len(list(Path(small.folder).glob("*.tar"))) == 3
    served.requests.clear()
    assert [reader.read(n).image for n in range(53)] == [jpeg(n) for n in range(53)]
    assert served.requests.total() == 0


def test_a_killed_download_leaves_nothing_that_is_used(served, cache, jpeg):
    url = f"{served.url}/train-000000.tar"
    served.stall = "train-000000.tar"
    first = start(read_all, url, cache)
    assert served.stalled.wait(120)
    out = multiprocessing.get_context("fork").Queue()
    waiting = start(read_all, url, cache, out)
    (lock,) = (path for path in Path(cache.folder).glob("*.lock") if path.name != "room.lock")
    assert is_locked(lock)
    time.sleep(0.2)
    assert served.tars().total() == 1
    (part,) = Path(cache.folder).glob("*.part")
    # It has its size already, and not yet its bytes.
    assert part.stat().st_size == (served.folder / "train-000000.tar").stat().st_size
    assert list(Path(cache.folder).glob("*.tar")) == []
    os.kill(first.pid, signal.SIGKILL)
    first.join(120)
    # The next one takes over and starts anew.
    assert out.get(timeout=120) == [jpeg(n) for n in range(10)]
    waiting.join(120)
    assert served.tars().total() == 2
    assert list(Path(cache.folder).glob("*.part")) == []
    (kept,) = Path(cache.folder).glob("*.tar")
    assert kept.read_bytes() == (served.folder / "train-000000.tar").read_bytes()


def test_a_download_waits_for_the_room_of_another(served, cache, jpeg):
    small = room_for(1, cache, served)
    source = ShardSource(f"{served.url}/{NAMES}", cache=small)
    served.stall = "train-000000.tar"
    first = start(source.read, 0)
    assert served.stalled.wait(120)
    out = multiprocessing.get_context("fork").Queue()
    second = start(lambda: out.put(source.read(10).image))
    time.sleep(0.3)
    assert served.tars() == {"train-000000.tar": 1}
    assert used(small) <= small.max_bytes
    served.go_on.set()
    assert out.get(timeout=120) == jpeg(10)
    for process in (first, second):
        process.join(120)
    assert used(small) <= small.max_bytes


def test_parts_of_the_dead_make_room(served, cache):
    small = room_for(3, cache, served)
    source = ShardSource(f"{served.url}/{NAMES}", cache=small)
    dead = Path(small.folder) / "dead.part"
    dead.touch()
    os.truncate(dead, small.max_bytes)
    living = Path(small.folder) / "living.part"
    living.write_bytes(b"")
    with open(living.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        source.read(0)
        assert not dead.exists()
        assert living.exists()
    source.read(10)
    assert not living.exists()


def test_a_cached_file_that_was_cut_is_fetched_again(served, cache, jpeg):
    source = ShardSource(f"{served.url}/train-000000.tar", cache=cache)
    source.read(0)
    source.close()
    (kept,) = Path(cache.folder).glob("*.tar")
    os.truncate(kept, 2000)
    assert source.read(9).image == jpeg(9)
    assert served.tars().total() == 2


def test_a_size_that_nobody_says(served, cache, jpeg):
    small = room_for(3, cache, served)
    for path in served.folder.glob("*.tar"):
        served.cut[path.name] = (None, None)
        path.with_name(path.name + ".index.json").unlink()
    source = ShardSource(f"{served.url}/{NAMES}", cache=small)
    assert 0 < used(small) <= small.max_bytes
    assert source.read(33).image == jpeg(33)


def test_a_shard_larger_than_the_cache(served, cache):
    tiny = CacheConfig(folder=cache.folder, max_bytes=1000)
    source = ShardSource(f"{served.url}/train-000000.tar", cache=tiny)
    with pytest.raises(DataError, match=r"bytes, more than the whole cache, max_bytes=1000") as caught:
        source.read(0)
    assert "\n" not in str(caught.value)
    (served.folder / "train-000000.tar.index.json").unlink()
    served.cut["train-000000.tar"] = (None, None)
    with pytest.raises(DataError, match="larger than the whole cache, max_bytes=1000"):
        ShardSource(f"{served.url}/train-000000.tar", cache=CacheConfig(folder=cache.folder + "2", max_bytes=1000))


def test_a_folder_that_cannot_be_written(served, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(DataError, match=r"the cache of shards '.*/file/x' cannot be used: Not a directory"):
        ShardSource(f"{served.url}/train-000000.tar", cache=CacheConfig(folder=str(tmp_path / "file" / "x")))


def test_where_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("HJEPA_CACHE", str(tmp_path))
    assert ShardCache(CacheConfig()).folder == tmp_path
    assert ShardCache(CacheConfig(folder="/elsewhere")).folder == Path("/elsewhere")
    monkeypatch.delenv("HJEPA_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ShardCache(CacheConfig()).folder == tmp_path / ".cache/hjepa/shards"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "fields", [{"max_bytes": 0}, {"attempts": 0}, {"first_wait": -1.0}, {"timeout": 0.0}, {"timeout": float("nan")}]
)
def test_configuration_is_checked(fields):
    (name,) = fields
    with pytest.raises(ValueError, match=f"^{name}=.*allowed: "):
        CacheConfig(**fields)


def test_a_source_reaches_other_processes(served, cache, jpeg):
    source = ShardSource(f"{served.url}/train-000000.tar", cache=cache)
    source.read(0)
    copy = pickle.loads(pickle.dumps(source))
    assert copy.read(7).image == jpeg(7)


def test_a_disk_that_is_full_is_not_asked_for_each_sample(served, cache):
    patient = CacheConfig(folder=cache.folder, first_wait=0.001, retry_after=60.0)
    source = ShardSource(f"{served.url}/train-000000.tar", cache=patient)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(DataError, match="cannot be used: File too large"):
            source.read(0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    # There is room now, but the shard was given up for a minute.
    with pytest.raises(DataError, match="cannot be used: File too large"):
        source.read(1)
    assert not list(Path(cache.folder).glob("*.part"))
