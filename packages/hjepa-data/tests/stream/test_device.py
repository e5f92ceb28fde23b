import itertools

import pytest
import torch

from hjepa_data import DataError, ShardSource, StreamConfig, ViewGroup, WorkerConfig
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
    pairs = zip((*one.views, one.sample, one.epoch), (*two.views, two.sample, two.epoch), strict=True)
    return all(torch.equal(a.cpu(), b.cpu()) for a, b in pairs)


@pytest.mark.parametrize("workers", [0, 2])
def test_it_gives_the_batches_and_states_of_its_stream(shards, device, workers):
    plain, ahead = build(shards), DevicePrefetcher(build(shards, workers), device)
    for _ in range(12):
        assert ahead.state_dict() == plain.state_dict()
        batch = next(ahead)
        assert same(batch, next(plain))
        assert {t.device.type for t in (*batch.views, batch.labels, batch.sample, batch.epoch)} == {device.type}
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
