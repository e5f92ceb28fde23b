"""Each fault, made in real files and real processes."""

import errno
import itertools
import logging
import multiprocessing
import multiprocessing.context
import os
import resource
import signal
import struct
import subprocess
import sys
import textwrap
import time
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data._utils import signal_handling
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from hjepa_data import DataError, EvalConfig, ShardSource, StreamConfig, ViewGroup, WorkerConfig, WorkerError
from hjepa_data import write_shards as write
from hjepa_data.stream import loader
from hjepa_data.transforms.decode import SkipImageError, open_image

SEED = 3
BAD = 40


def config(workers=0, batch=6, **fields):
    return StreamConfig(
        global_batch_size=batch,
        window_shards=2,
        views=(ViewGroup(size=(8, 8)),),
        workers=WorkerConfig(count=workers, timeout=fields.pop("timeout", 60.0)),
        **fields,
    )


def take(stream, count):
    return list(itertools.islice(stream, count))


def same(one, two):
    return torch.equal(one.views[0], two.views[0]) and torch.equal(one.sample, two.sample)


class Faulty(ShardSource):
    """Something happens to the worker that reads sample 40 for the first time."""

    def __init__(self, shards, log, fault):
        super().__init__(shards)
        self.log, self.fault = log, fault

    def read(self, index):
        if index == BAD and not self.log.exists():
            self.log.write_text(f"{os.getpid()}")
            self.fault()
        return super().read(index)


def out_of_memory():
    raise MemoryError


FAULTS = {
    "killed": (lambda: os.kill(os.getpid(), signal.SIGKILL), r"ended by signal 9 \(Killed\); out of memory\?"),
    "crashed": (lambda: os.kill(os.getpid(), signal.SIGSEGV), r"ended by signal 11 \(Segmentation fault\)"),
    "exited": (lambda: os._exit(3), "ended with exit code 3"),
    "asleep": (lambda: time.sleep(600), "has given nothing for 8 s"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_worker_that_ends_or_hangs_is_named_while_next_waits(shards, tmp_path, fault):
    action, message = FAULTS[fault]
    others = multiprocessing.active_children()
    reference = take(config().build(ShardSource(shards), seed=SEED), 9)
    patience = 8.0 if fault == "asleep" else 600.0
    stream = config(2, timeout=patience).build(Faulty(shards, tmp_path / "log", action), seed=SEED)
    given = []
    with pytest.raises(WorkerError, match=message) as caught:
        given.extend(stream)
    pid = (tmp_path / "log").read_text()
    assert f"(process {pid})" in str(caught.value)
    assert "\n" not in str(caught.value)
    caught = None
    # Nothing is lost: with new workers the stream goes on where it stood.
    given += take(stream, 9 - len(given))
    assert all(same(a, b) for a, b in zip(given, reference, strict=True))
    stream.close()
    assert set(multiprocessing.active_children()) <= set(others)


@pytest.mark.timeout(60)
def test_a_worker_that_dies_with_the_lock_of_the_loader_holds_up_nobody(shards, tmp_path, monkeypatch):
    check = loader._check_workers

    def check_and_seize(batches):
        try:
            check(batches)
        except WorkerError:
            # As one that is killed while it looks whether the loader has ended.
            assert batches._workers_done_event._cond.acquire(timeout=30)
            raise

    monkeypatch.setattr(loader, "_check_workers", check_and_seize)
    stream = config(2).build(Faulty(shards, tmp_path / "log", FAULTS["exited"][0]), seed=SEED)
    with pytest.raises(WorkerError, match="ended with exit code 3") as caught:
        list(stream)
    del caught
    assert len(take(stream, 3)) == 3
    stream.close()


def test_a_worker_without_memory_is_an_error(shards, tmp_path):
    stream = config(1).build(Faulty(shards, tmp_path / "log", out_of_memory), seed=SEED)
    with pytest.raises(WorkerError, match="ran out of memory"):
        take(stream, 9)
    assert len(take(stream, 9)) == 9
    stream.close()


def limit_files(size):
    """The same as a full /dev/shm: the system gives no more room."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def test_a_worker_without_shared_memory_is_an_error(shards, tmp_path):
    source = Faulty(shards, tmp_path / "log", lambda: limit_files(100))
    stream = EvalConfig(batch_size=6, size=(8, 8), workers=WorkerConfig(count=1, timeout=60.0)).build(source)
    with pytest.raises(WorkerError, match=r"shared memory \(/dev/shm\); fewer workers"):
        list(stream)


def test_without_shared_memory_no_worker_starts(shards):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    stream = config(1).build(ShardSource(shards), seed=SEED)
    limit_files(100)
    try:
        with pytest.raises(WorkerError, match=r"no shared memory \(/dev/shm\) for a batch of 1416 bytes") as caught:
            next(stream)
    finally:
        limit_files(before)
    assert "\n" not in str(caught.value)
    assert len(take(stream, 9)) == 9
    stream.close()


def test_a_slow_worker_beside_a_dead_one_does_not_hide_it(shards, tmp_path):
    """The others keep giving batches, one in each second in which the loader looks."""

    class Slow(Faulty):
        def read(self, index):
            time.sleep(0.05)
            return super().read(index)

    stream = config(3, timeout=600.0).build(Slow(shards, tmp_path / "log", lambda: os._exit(3)), seed=SEED)
    with pytest.raises(WorkerError, match="exit code 3"):
        take(stream, 9)
    stream.close()


@pytest.mark.slow
def test_a_spawned_worker_that_is_killed_is_named(shards, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent("""
        import os, signal, sys
        from hjepa_data import ShardSource, StreamConfig, ViewGroup, WorkerConfig, WorkerError

        class Faulty(ShardSource):
            def read(self, index):
                if index == 40:
                    print(os.getpid(), flush=True)
                    os.kill(os.getpid(), signal.SIGKILL)
                return super().read(index)

        if __name__ == "__main__":
            workers = WorkerConfig(count=1, start_method="spawn")
            config = StreamConfig(global_batch_size=6, views=(ViewGroup(size=(8, 8)),), workers=workers)
            stream = config.build(Faulty(sys.argv[1]), seed=3)
            try:
                for _ in range(9):
                    next(stream)
            except WorkerError as error:
                print(error)
        """)
    )
    done = subprocess.run([sys.executable, script, shards], capture_output=True, text=True, timeout=300, check=True)
    pid, message = done.stdout.split(maxsplit=1)
    assert f"(process {pid}) was ended by signal 9" in message


def test_a_worker_that_dies_between_two_batches_is_found_by_the_next(shards):
    others = {child.pid for child in multiprocessing.active_children()}
    stream = config(2).build(ShardSource(shards), seed=SEED)
    next(stream)
    worker = next(child.pid for child in multiprocessing.active_children() if child.pid not in others)
    os.kill(worker, signal.SIGKILL)
    # Until the signal of its end has come: the error must come from the stream, not from any line.
    os.waitid(os.P_PID, worker, os.WEXITED | os.WNOWAIT)
    with pytest.raises(WorkerError, match=rf"\(process {worker}\).*signal 9.*out of memory") as caught:
        take(stream, 50)
    assert "\n" not in str(caught.value)
    stream.close()


def test_a_worker_that_dies_while_the_others_start_is_named(shards, monkeypatch):
    monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)  # as in a program that has not begun yet
    reset, dead = _MultiProcessingDataLoaderIter._reset, []

    def late(batches, *arguments, **options):
        dead.append(batches._workers[0].pid)
        os.kill(dead[0], signal.SIGKILL)
        os.waitid(os.P_PID, dead[0], os.WEXITED | os.WNOWAIT)
        reset(batches, *arguments, **options)

    before = signal.getsignal(signal.SIGCHLD)
    with monkeypatch.context() as patch:
        patch.setattr(_MultiProcessingDataLoaderIter, "_reset", late)
        stream = config(2).build(ShardSource(shards), seed=SEED)
        with pytest.raises(WorkerError, match="ended by signal 9") as caught:
            next(stream)
    assert f"(process {dead[0]})" in str(caught.value)
    assert signal.getsignal(signal.SIGCHLD) is before
    next(stream)
    stream.close()


def test_a_worker_whose_sockets_end_long_before_it_does_is_named(shards, monkeypatch):
    others, now = {child.pid for child in multiprocessing.active_children()}, [0.0]
    stream = config(1).build(ShardSource(shards), seed=SEED)
    next(stream)
    (worker,) = (child.pid for child in multiprocessing.active_children() if child.pid not in others)

    def sleep(seconds):
        now[0] += seconds
        if now[0] > 5.0:
            os.kill(worker, signal.SIGKILL)
            os.waitid(os.P_PID, worker, os.WEXITED | os.WNOWAIT)

    def ended(*_):
        raise ConnectionResetError

    monkeypatch.setattr(loader, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    monkeypatch.setattr(_MultiProcessingDataLoaderIter, "_try_get_data", ended)
    with pytest.raises(WorkerError, match=rf"\(process {worker}\) was ended by signal 9"):
        next(stream)
    stream.close()


@pytest.mark.filterwarnings("ignore:.*_MultiProcessingDataLoaderIter.__del__")  # torch's own, of a half-made one
def test_workers_end_where_one_of_them_cannot_start(shards, monkeypatch):
    others, start = multiprocessing.active_children(), multiprocessing.context.ForkProcess.start

    def full(process):
        if len(multiprocessing.active_children()) > len(others):
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        start(process)

    monkeypatch.setattr(multiprocessing.context.ForkProcess, "start", full)
    with pytest.raises(BlockingIOError):
        next(config(2).build(ShardSource(shards), seed=SEED))
    for worker in set(multiprocessing.active_children()) - set(others):
        worker.join(120)
        assert worker.exitcode == -signal.SIGKILL


# Shards that cannot be read.


def broken(folder, jpeg):
    """Eight shards of five images; one is cut off and one is gone after they were numbered."""
    paths = write([(jpeg(n), n % 7) for n in range(40)], folder, samples_per_shard=5)
    source = ShardSource(paths)
    data = paths[2].read_bytes()
    paths[2].write_bytes(data[: len(data) // 2])
    paths[5].unlink()
    cut = {n for n in range(10, 15) if source._rows["offsets"][n] + source._rows["sizes"][n] > len(data) // 2}
    return source, cut | set(range(25, 30))


@pytest.mark.parametrize("workers", [0, 2])
def test_what_cannot_be_read_stops_the_stream(tmp_path, jpeg, workers):
    source, _ = broken(tmp_path, jpeg)
    with pytest.raises(DataError, match=r"(000002.tar' changed while in use|000005.tar' cannot be read)") as caught:
        take(config(workers).build(source, seed=SEED), 7)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="while in use"):
        list(EvalConfig(batch_size=6, size=(8, 8), workers=WorkerConfig(count=workers)).build(source))


def test_a_lost_shard_of_many_samples_is_skipped(tmp_path):
    """Without shuffling over shards all of them stand together."""
    paths = write([np.full((8, 8, 3), n % 251, np.uint8) for n in range(2200)], tmp_path, samples_per_shard=1100)
    shuffled = {"window_shards": 1, "views": (ViewGroup(size=(8, 8)),), "global_batch_size": 100}
    stream = StreamConfig(**shuffled, unreadable="skip", max_skipped_fraction=0.6).build(ShardSource(paths), seed=SEED)
    paths[0].unlink()
    planned = stream._order.span(0, 5000)[1]
    shown = torch.cat([batch.sample for batch in take(stream, 22)]).tolist()
    assert stream.skipped == {"unreadable": 1100}
    for position, sample in enumerate(shown):
        assert sample == next(s for s in planned[position:].tolist() if s >= 1100)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_cannot_be_read_is_skipped_and_counted(tmp_path, jpeg, caplog, workers):
    source, bad = broken(tmp_path, jpeg)
    assert 5 < len(bad) < 10
    stream = config(workers, unreadable="skip", max_skipped_fraction=0.5).build(source, seed=SEED)
    with caplog.at_level(logging.WARNING):
        batches = take(stream, 14)
    # 14 batches of 6 are two epochs of 40 and 4 positions of the third.
    planned = stream._order.span(0, 200)[1].tolist()
    assert stream.skipped == {"unreadable": sum(sample in bad for sample in planned[: 14 * 6])}
    assert sum("unreadable" in record.message for record in caplog.records) == 1
    assert "tar" in caplog.text
    shown = torch.cat([batch.sample for batch in batches]).tolist()
    for position, sample in enumerate(shown):
        assert sample == next(s for s in planned[position:] if s not in bad)
    # What a position shows does not depend on the batch that it falls in.
    again = take(config(0, 4, unreadable="skip", max_skipped_fraction=0.5).build(source, seed=SEED), 21)
    assert torch.cat([batch.sample for batch in again]).tolist() == shown
    assert torch.equal(torch.cat([b.views[0] for b in again]), torch.cat([b.views[0] for b in batches]))
    stream.close()
    evaluation = EvalConfig(
        batch_size=6, size=(8, 8), workers=WorkerConfig(count=workers), unreadable="skip", max_skipped_fraction=0.5
    ).build(source)
    given = torch.cat([batch.sample for batch in evaluation]).tolist()
    assert given == [n for n in range(40) if n not in bad]
    assert evaluation.skipped == {"unreadable": len(bad)}


def test_too_much_that_cannot_be_read_stops_the_stream_and_says_where(tmp_path, jpeg):
    source, _ = broken(tmp_path, jpeg)
    stream = config(unreadable="skip").build(source, seed=SEED)
    with pytest.raises(
        DataError, match=r"11 images .* left out .*\(11 unreadable; the last: shard '.*tar' .*max_skipped"
    ):
        take(stream, 200)


def test_a_stream_goes_on_after_an_error_where_it_stood(tmp_path, jpeg):
    paths = write([jpeg(n) for n in range(40)], tmp_path, samples_per_shard=5)
    reference = take(config().build(ShardSource(paths), seed=SEED), 12)
    for workers in (0, 2):
        stream = config(workers).build(ShardSource(paths), seed=SEED)
        aside = paths[5].rename(tmp_path / "aside")
        given = []
        with pytest.raises(DataError):
            given.extend(stream)
        state = stream.state_dict()
        assert state["epoch"] * 40 + state["position"] == 6 * len(given)
        aside.rename(paths[5])
        given += take(stream, 12 - len(given))
        assert all(same(a, b) for a, b in zip(given, reference, strict=True))
        stream.close()


def test_wrong_policies_are_refused():
    for build in (StreamConfig, EvalConfig):
        with pytest.raises(ValueError, match=r"unreadable='ignore'.*allowed: stop, skip"):
            build(unreadable="ignore")
    with pytest.raises(ValueError, match="timeout=0"):
        WorkerConfig(timeout=0)


# Images that would take the memory of the machine.


def png(width, height, extra=b""):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(b"\0" * 1000)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def text_bomb():
    packed = b"a\0\0" + zlib.compress(b"\0" * (40 << 20), 1)
    chunk = struct.pack(">I", len(packed)) + b"zTXt" + packed + struct.pack(">I", zlib.crc32(b"zTXt" + packed))
    return png(8, 8, chunk)


def jpeg_of(jpeg, width, height):
    data = bytearray(jpeg(0))
    start = data.index(b"\xff\xc0") + 5
    data[start : start + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def webp(kind, width, height):
    if kind == b"VP8L":
        body = b"\x2f" + struct.pack("<I", (width - 1) | (height - 1) << 14) + b"\x07\x10\x11\xfd\x0f\x44\x44\xff\x03"
    elif kind == b"VP8 ":
        body = b"\x10\0\0\x9d\x01\x2a" + struct.pack("<HH", width, height) + b"\0" * 16
    else:
        body = b"\0" * 4 + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    chunk = kind + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)
    rest = b"" if kind != b"VP8X" else webp(b"VP8L", width, height)[12:]
    return b"RIFF" + struct.pack("<I", 4 + len(chunk + rest)) + b"WEBP" + chunk + rest


def bombs(jpeg):
    return {
        "png": png(60_000, 60_000),
        "png below Pillow's limit": png(12_000, 12_000),
        "jpeg": jpeg_of(jpeg, 65_535, 65_535),
        "jpeg below Pillow's limit": jpeg_of(jpeg, 12_000, 12_000),
        "webp": webp(b"VP8L", 16_383, 16_383),
        "webp below Pillow's limit": webp(b"VP8L", 12_000, 12_000),
        "lossy webp": webp(b"VP8 ", 12_000, 12_000),
        "extended webp": webp(b"VP8X", 12_000, 12_000),
    }


BOMB_SCRIPT = """
import resource, sys, warnings
from pathlib import Path
from hjepa_data.transforms.decode import SkipImageError, open_image
warnings.simplefilter("ignore")
taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + (128 << 20), -1))
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        open_image(path.read_bytes(), max_pixels=50_000_000).decode(1.0)
    except SkipImageError as skip:
        print(path.name, skip.reason, sep=": ")
    except MemoryError:
        print(path.name, "took the memory", sep=": ")
"""


def test_bombs_are_refused_before_memory_is_taken(tmp_path, jpeg):
    made = {**bombs(jpeg), "text": text_bomb()}
    for name, data in made.items():
        (tmp_path / name).write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-c", BOMB_SCRIPT, tmp_path], capture_output=True, text=True, timeout=300, check=True
    )
    found = dict(line.split(": ") for line in done.stdout.splitlines())
    assert found == {**dict.fromkeys(bombs(jpeg), "too_large"), "text": "undecodable"}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bombs_in_a_shard_are_counted(tmp_path, jpeg):
    import tarfile

    made = bombs(jpeg)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number, data in enumerate([*made.values(), *(jpeg(n) for n in range(24))]):
            (tmp_path / "image").write_bytes(data)
            tar.add(tmp_path / "image", arcname=f"{number}.jpg")
    stream = config(1, 32, max_pixels=50_000_000).build(ShardSource(tmp_path / "a.tar"), seed=0)
    assert min(next(stream).sample.tolist()) >= len(made)
    assert stream.skipped == {"too_large": len(made)}
    stream.close()


def test_real_webps_of_each_kind_are_read():
    import io

    from PIL import Image

    pixels = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8))
    for options in ({"lossless": True}, {"quality": 80}, {"quality": 80, "exif": b"Exif\0\0"}):
        buffer = io.BytesIO()
        pixels.save(buffer, "WEBP", **options)
        upright = open_image(buffer.getvalue(), max_pixels=1500)
        assert (upright.width, upright.height) == (50, 30)
        upright.decode(1.0)
        with pytest.raises(SkipImageError, match="too_large"):
            open_image(buffer.getvalue(), max_pixels=1499)
