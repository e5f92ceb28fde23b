"""Exact resume, in real processes with real tars: every step, any number of workers and ranks."""

import hashlib
import itertools
import multiprocessing
import threading
import time
from collections import Counter

import numpy as np
import pytest

from hjepa_data import (
    DataError,
    FolderSource,
    MixtureSource,
    RawSample,
    ShardSource,
    StreamConfig,
    ViewGroup,
    WorkerConfig,
    write_shards,
)

SEED, BATCH, STEPS = 23, 6, 10
FORK = multiprocessing.get_context("fork")


def build(source, workers=0, **layout):
    views = (ViewGroup(count=2, size=(8, 12)), ViewGroup(size=(4, 4), scale=(0.05, 0.3)))
    config = StreamConfig(global_batch_size=BATCH, window_shards=2, views=views, workers=WorkerConfig(count=workers))
    return config.build(source, seed=SEED, **layout)


def shown(batch):
    """What a batch shows: epoch, sample, label and a hash of all pixels and crops of each row."""
    seen = (*batch.views, *batch.crops)
    rows = zip(batch.epoch.tolist(), batch.sample.tolist(), batch.labels.tolist(), *seen, strict=True)
    return [
        (epoch, sample, label, hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest())
        for epoch, sample, label, *parts in rows
    ]


def run_rank(source, state, workers, rank, world, steps, results):
    stream = build(source, workers, rank=rank, world_size=world)
    stream.load_state_dict(state)
    found = [shown(next(stream)) for _ in range(steps)]
    results.put((rank, found, stream.state_dict()))
    stream.close()


def run_ranks(source, state, *, world, workers, steps):
    """Go on from a state in ``world`` processes; give the rows in global order and the new state."""
    results = FORK.Queue()
    ranks = [
        FORK.Process(target=run_rank, args=(source, state, workers, rank, world, steps, results))
        for rank in range(world)
    ]
    for rank in ranks:
        rank.start()
    found = sorted(results.get(timeout=120) for _ in ranks)
    for rank in ranks:
        rank.join()
    assert all(saved == found[0][2] for _, _, saved in found)
    return [row for step in range(steps) for _, parts, _ in found for row in parts[step]], found[0][2]


@pytest.fixture(scope="module", params=["shards", "mixture"])
def source(request, tmp_path_factory, jpeg):
    """23 images: in five tars, or 14 in tars mixed with 9 in a folder."""
    folder = tmp_path_factory.mktemp("resume")
    if request.param == "shards":
        return ShardSource(write_shards([(jpeg(n), n % 7) for n in range(23)], folder / "tars", samples_per_shard=5))
    shards = ShardSource(write_shards([(jpeg(n), n % 7) for n in range(14)], folder / "tars", samples_per_shard=5))
    (folder / "files").mkdir()
    for n in range(9):
        (folder / "files" / f"{n}.jpg").write_bytes(jpeg(50 + n))
    return MixtureSource([shards, FolderSource(folder / "files", group_size=4)], [2, 1])


@pytest.fixture(scope="module")
def reference(source):
    """The rows of ten steps without an interruption, and the state after each."""
    stream = build(source)
    states, rows = [stream.state_dict()], []
    for batch in itertools.islice(stream, STEPS):
        rows.append(shown(batch))
        states.append(stream.state_dict())
    return states, rows


def check_epochs(source, rows):
    """Each sample of each source exactly once in each of its epochs, until the last epoch that was begun."""
    parts = [range(len(source))]
    if isinstance(source, MixtureSource):
        parts = [range(14), range(14, 23)]
    for part in parts:
        own = [(epoch, sample) for epoch, sample, *_ in rows if sample in part]
        last = max(epoch for epoch, _ in own)
        for epoch in range(last):
            assert Counter(sample for number, sample in own if number == epoch) == Counter(part)
        assert max(Counter(own).values()) == 1
        assert last >= 1


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_the_same_layout_goes_on_bit_for_bit_from_every_step(source, reference, workers):
    states, rows = reference
    check_epochs(source, list(itertools.chain(*rows)))
    for step in range(STEPS):
        stream = build(source, workers)
        stream.load_state_dict(states[step])
        # All the rest of it without workers; with some, which take a while to start, the next two steps.
        ahead = STEPS - step if workers == 0 else min(2, STEPS - step)
        assert [shown(batch) for batch in itertools.islice(stream, ahead)] == rows[step : step + ahead]
        assert stream.state_dict() == states[step + ahead]
        stream.close()


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "first"),
    [*(("shards", step) for step in range(1, STEPS - 2)), ("mixture", 2), ("mixture", 5)],
    indirect=["source"],
)
def test_ranks_in_processes_of_their_own_go_on_from_every_step(source, reference, first):
    """World sizes 1, 2, 3, 1 with 0, 1, 3 and 0 workers each; the changes lie after every step of an epoch."""
    states, expected = reference
    state, rows = states[0], []
    workers = (0, 1, 3) if first % 2 else (3, 0, 1)
    rest = STEPS - first - 2
    for world, count, steps in ((1, workers[0], first), (2, workers[1], 1), (3, workers[2], 1), (1, 0, rest)):
        found, state = run_ranks(source, state, world=world, workers=count, steps=steps)
        rows += found
    check_epochs(source, rows)
    assert rows == list(itertools.chain(*expected))
    assert state == states[STEPS]


class Index:
    """An index of so many samples whose images are all the same; it notes what is read."""

    def __init__(self, group_sizes, image):
        self.group_sizes = np.asarray(group_sizes)
        self.labels = np.broadcast_to(np.int64(-1), int(self.group_sizes.sum()))
        self.image, self.reads, self.ahead = image, [], []

    def __len__(self):
        return len(self.labels)

    def read(self, index):
        self.reads.append(index)
        return RawSample(image=self.image, label=-1)

    def read_ahead(self, groups):
        self.ahead += groups

    def locate(self, index):
        return str(index)

    def close(self):
        pass


def test_restore_in_the_middle_of_ten_million_samples(jpeg):
    sizes = np.full(1000, 10_000) + np.arange(1000) - 500
    sizes[-1] += 500
    state = {"epoch": 3, "position": 6_543_210, "samples": 10_000_000, "order": None}
    state["order"] = StreamConfig().build(Index(sizes, b""), seed=1).state_dict()["order"]
    source = Index(sizes, jpeg(0))
    views = (ViewGroup(size=(8, 8)),)
    begin = time.process_time()
    stream = StreamConfig(global_batch_size=256, views=views).build(source, seed=1)
    stream.load_state_dict(state)
    batch = next(stream)
    seconds = time.process_time() - begin
    print(f"restored, with a batch of 256 images, in {seconds:.2f} s")
    assert seconds < 5
    assert source.reads == batch.sample.tolist()
    consumed = np.zeros(10_000_000, dtype=bool)
    consumed[stream._order.span(3 * 10_000_000, 6_543_210)[1]] = True
    assert consumed.sum() == 6_543_210
    assert not consumed[source.reads].any()
    # Of shards that were consumed whole none is touched, not even ahead.
    of_shard = np.add.reduceat(consumed, np.cumsum(sizes) - sizes, dtype=np.int64)
    assert (of_shard == sizes).sum() > 600
    assert (of_shard < sizes)[source.ahead].all()


@pytest.mark.parametrize(("shards", "steps"), [(4, 60), (100, 19)])
def test_shards_are_read_ahead_once_while_they_are_in_use(jpeg, shards, steps):
    """Four are in use in every epoch; of a hundred, all are asked for before the last window of five begins."""
    source = Index(np.full(shards, 2), jpeg(0, size=(8, 8)))
    config = StreamConfig(global_batch_size=10, window_shards=5, views=(ViewGroup(size=(2, 2)),))
    before = set(threading.enumerate())
    for _ in zip(range(steps), config.build(source, seed=5), strict=False):
        for thread in set(threading.enumerate()) - before:
            thread.join()
    assert sorted(source.ahead) == list(range(shards))


def test_64_ranks_of_8_workers_share_1000_shards(jpeg):
    """The order of a million samples and the shares of ranks and workers, with the streams' own arithmetic."""
    world, workers, batch = 64, 8, 2048
    sizes = np.random.default_rng(0).integers(500, 1500, 1000)
    source, total = Index(sizes, b""), int(sizes.sum())
    ranks = [
        StreamConfig(global_batch_size=batch).build(source, seed=5, rank=r, world_size=world) for r in range(world)
    ]
    steps = -(-total // batch)
    epochs, samples = ranks[0]._order.span(0, steps * batch)
    loads = []
    taken = np.zeros(len(samples), dtype=np.int64)
    for stream in ranks:
        starts = np.array(list(itertools.islice(stream._starts(), steps)))
        positions = starts[:, None] + np.arange(stream._count)
        # A loader deals its batches to its workers in turn.
        for worker in range(workers):
            np.add.at(taken, positions[worker::workers].ravel(), 1)
        loads.append(np.bincount(epochs[positions].ravel())[0])
    assert (taken == 1).all()
    assert np.array_equal(np.bincount(samples[epochs == 0], minlength=total), np.ones(total, dtype=np.int64))
    assert max(loads) - min(loads) <= batch // world
    window = sizes.mean() * ranks[0].config.window_shards
    assert max(loads) - min(loads) < window


def test_64_streams_over_1000_shards_read_each_sample_once(jpeg):
    source = Index(np.full(1000, 2), jpeg(0, size=(8, 8)))
    config = StreamConfig(global_batch_size=64 * 5, views=(ViewGroup(size=(2, 2)),))
    seen = Counter()
    for rank in range(64):
        stream = config.build(source, seed=5, rank=rank, world_size=64)
        for batch in itertools.islice(stream, 7):
            seen.update(batch.sample[batch.epoch == 0].tolist())
    # 7 steps of 320 are an epoch of 2,000 and 240 images of the next one.
    assert seen == Counter(range(2000))
    assert len(source.reads) == 7 * 320


def test_a_state_of_something_else_is_one_line(shards):
    stream = build(ShardSource(shards))
    with pytest.raises(DataError, match="the saved state lacks order, position, samples: it is not that of a stream"):
        stream.load_state_dict({"epoch": 1})
