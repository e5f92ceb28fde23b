"""Batches in shared memory that is used again: never while somebody still looks at them."""

import gc
import itertools

import pytest
import torch

from hjepa_data import ShardSource, StreamConfig, ViewGroup, WorkerConfig
from hjepa_data.stream.pool import BatchPool

VIEWS = (ViewGroup(count=2, size=(8, 8)), ViewGroup(size=(5, 7)))
PLACES = 2 * 2 + 3


def stream(shards, workers=2, **fields):
    config = StreamConfig(
        global_batch_size=6, views=VIEWS, workers=WorkerConfig(count=workers, prefetch=2, **fields), window_shards=2
    )
    return config.build(ShardSource(shards), seed=3)


def tensors(batch):
    return (*batch.views, *batch.numbers)


def same(one, two):
    return all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(two), strict=True))


def part_of(batch, step):
    return (batch.views[0][2:4], batch.views[2].numpy()[1], batch.sample[3], batch.crops[1][2])[step % 4]


def take(stream, count):
    found = list(itertools.islice(stream, count))
    stream.close()
    return found


def test_batches_that_are_all_held_keep_their_pixels(shards):
    held = take(stream(shards), 4 * PLACES)
    assert all(same(*pair) for pair in zip(held, take(stream(shards, workers=0), 4 * PLACES), strict=True))


def test_parts_that_are_held_keep_their_pixels(shards):
    """A slice, an array or a number of a batch is enough to hold its place."""
    parts = []
    running = stream(shards)
    for step, batch in zip(range(4 * PLACES), running, strict=False):
        parts.append(part_of(batch, step))
    del batch
    running.close()
    for step, (part, batch) in enumerate(zip(parts, take(stream(shards, workers=0), 4 * PLACES), strict=True)):
        assert (part == part_of(batch, step)).all()


def test_memory_is_used_again(shards):
    running = stream(shards)
    places = {batch.views[0].data_ptr() for _, batch in zip(range(10 * PLACES), running, strict=False)}
    running.close()
    assert len(places) <= PLACES


@pytest.mark.slow
def test_spawned_workers_write_into_it(shards):
    found = take(stream(shards, start_method="spawn"), 2 * PLACES)
    assert all(same(*pair) for pair in zip(found, take(stream(shards, workers=0), 2 * PLACES), strict=True))


def test_a_place_is_free_when_the_last_tensor_is_gone():
    pool = BatchPool([(4, 3, 2, 2), (4, 3, 5, 1)], places=2)
    first, second = pool.take(), pool.take()
    assert (first, second, pool.take()) == (0, 1, None)
    pool.batch(first).views[1].fill_(7)
    pool.batch(first).labels.fill_(-1)
    for number, crop in enumerate(pool.batch(first).crops):
        crop.fill_(number / 2)
    batch = pool.lend(first)
    assert [tuple(view.shape) for view in batch.views] == [(4, 3, 2, 2), (4, 3, 5, 1)]
    assert (batch.views[1] == 7).all()
    assert batch.labels.tolist() == [-1] * 4
    assert [crop.tolist() for crop in batch.crops] == [[[0.0] * 5] * 4, [[0.5] * 5] * 4]
    row = batch.views[1][2]
    del batch
    gc.collect()
    assert pool.take() is None
    del row
    assert pool.take() == first
