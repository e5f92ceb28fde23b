import itertools

import pytest
import torch

from hjepa_data import DataError, ShardSource, StreamConfig, ViewGroup, WorkerConfig, write_shards
from hjepa_data.stream.device import DevicePrefetcher

SEED = 5


def build(shards, workers=0):
    config = StreamConfig(
        global_batch_size=6,
        views=(ViewGroup(size=(8, 8)), ViewGroup(size=(4, 4))),
        workers=WorkerConfig(count=workers, pin_memory=True),
    )
    return config.build(ShardSource(shards), seed=SEED)


def take(batches, count):
    return list(itertools.islice(batches, count))


def same(one, two):
    pairs = zip((*one.views, *one.numbers), (*two.views, *two.numbers), strict=True)
    return all(torch.equal(a.cpu(), b.cpu()) for a, b in pairs)


@pytest.mark.parametrize("workers", [0, 2])
def test_it_gives_the_batches_and_states_of_its_stream(shards, device, workers):
    plain, ahead = build(shards), DevicePrefetcher(build(shards, workers), device)
    for _ in range(12):
        assert ahead.state_dict() == plain.state_dict()
        batch = next(ahead)
        assert same(batch, next(plain))
        assert {t.device.type for t in (*batch.views, *batch.numbers)} == {device.type}
    assert ahead.state_dict() == plain.state_dict()
    ahead.close()
    # Nothing was lost by closing.
    assert same(next(ahead), next(plain))
    ahead.close()


def test_restore_at_every_step(shards, device):
    reference = take(build(shards), 12)
    stream, states = DevicePrefetcher(build(shards), device), []
    for _ in range(12):
        states.append(stream.state_dict())
        next(stream)
    for step in range(11, -1, -1):
        stream.load_state_dict(states[step])
        assert stream.state_dict() == states[step]
        assert same(next(stream), reference[step])


def test_a_state_that_is_refused_loses_no_batch(shards, device):
    reference, stream = take(build(shards), 3), DevicePrefetcher(build(shards), device)
    next(stream)
    with pytest.raises(DataError, match="the saved state lacks"):
        stream.load_state_dict({})
    assert all(same(*pair) for pair in zip(take(stream, 2), reference[1:], strict=True))


def test_an_error_comes_after_the_batches_before_it(shards, device):
    stream = build(shards)
    reference = take(build(shards), 4)
    read, broken = (
        stream.source.read,
        set(reference[3].sample.tolist()) - {number for batch in reference[:3] for number in batch.sample.tolist()},
    )

    def fails(index):
        if index in broken:
            raise DataError("gone")
        return read(index)

    stream.source.read = fails
    ahead, given = DevicePrefetcher(stream, device), []
    with pytest.raises(DataError, match="gone"):
        given.extend(ahead)
    assert len(given) == 3
    assert ahead.state_dict()["position"] == 18
    broken.clear()
    assert same(next(ahead), reference[3])


@pytest.mark.cuda
def test_memory_is_kept_until_the_computation_is_done(shards):
    """On a busy device the values are right although the memory of each batch is freed at once."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    reference = take(build(shards), 40)
    stream, sums = DevicePrefetcher(build(shards, 2), "cuda"), []
    left = torch.randn(4096, 4096, device="cuda")
    for _ in range(40):
        batch = next(stream)
        assert batch.views[0].is_cuda
        for _ in range(5):
            left = (left @ left).tanh()
        sums.append(batch.views[0].long().sum())
        del batch
    assert [int(s) for s in sums] == [int(batch.views[0].long().sum()) for batch in reference]
    stream.close()


def test_images_that_are_left_out_count_once_however_often_it_is_closed(tmp_path, jpeg):
    write_shards([jpeg(n) if n % 4 else jpeg(n, size=(200, 200))[:300] for n in range(40)], tmp_path)
    config = StreamConfig(global_batch_size=10, views=(ViewGroup(size=(8, 8)),), max_skipped_fraction=1.0)
    plain = config.build(ShardSource(tmp_path), seed=SEED)
    ahead = DevicePrefetcher(config.build(ShardSource(tmp_path), seed=SEED), "cpu")
    for _ in range(4):
        assert same(next(ahead), next(plain))
        assert ahead.skipped == plain.skipped
        ahead.close()
    assert sum(ahead.skipped.values()) == 10


@pytest.mark.parametrize("first", [0, 1, 2])
def test_an_interrupt_loses_no_batch(shards, device, first):
    stream, reference = build(shards), take(build(shards), 4)
    read, calls = stream.source.read, itertools.count()

    def interrupted(index):
        if next(calls) == 6 * first + 3:
            raise KeyboardInterrupt
        return read(index)

    stream.source.read = interrupted
    ahead, given, state = DevicePrefetcher(stream, device), [], None
    while len(given) < 4:
        state = ahead.state_dict()
        try:
            given.append(next(ahead))
        except KeyboardInterrupt:
            assert ahead.state_dict() == state
    assert all(same(one, two) for one, two in zip(given, reference, strict=True))
