import itertools
import shutil

import numpy as np
import pytest
import torch

from hjepa_data import (
    DataError,
    ShardSource,
    StreamConfig,
    ViewGroup,
    WorkerConfig,
    write_shards,
)

SEED = 17
TOTAL = 53


def config(workers=0, batch=6, **fields):
    views = (ViewGroup(count=2, size=(8, 12)), ViewGroup(count=1, size=(4, 4), scale=(0.05, 0.3)))
    return StreamConfig(
        global_batch_size=batch, window_shards=2, views=views, workers=WorkerConfig(count=workers), **fields
    )


def take(stream, count):
    return list(itertools.islice(stream, count))


def same(one, two):
    return all(torch.equal(a, b) for a, b in zip((*one.views, *one.numbers), (*two.views, *two.numbers), strict=True))


@pytest.fixture(scope="module")
def source(shards):
    return ShardSource(shards)


@pytest.fixture(scope="module")
def reference(source):
    return take(config().build(source, seed=SEED), 22)


def test_batches_are_what_they_claim(reference, device):
    first = reference[0].to(device, non_blocking=True)
    assert len(first) == 6
    assert [tuple(view.shape) for view in first.views] == [(6, 3, 8, 12), (6, 3, 8, 12), (6, 3, 4, 4)]
    assert all(view.dtype == torch.uint8 and view.device.type == device.type for view in first.views)
    assert all(number.device.type == device.type for number in first.numbers)
    assert [tuple(crop.shape) for crop in first.crops] == [(6, 5)] * 3
    assert torch.equal(first.labels, first.sample % 7)
    assert not torch.equal(first.views[0], first.views[1])
    epochs = torch.cat([batch.epoch for batch in reference])
    samples = torch.cat([batch.sample for batch in reference])
    # 22 batches of 6 are two epochs of 53 and a part of the third; an epoch ends within a batch.
    assert epochs.tolist() == [0] * TOTAL + [1] * TOTAL + [2] * 26
    for epoch in (0, 1):
        assert sorted(samples[epochs == epoch].tolist()) == list(range(TOTAL))


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_do_not_change_a_bit(source, reference, workers):
    stream = config(workers).build(source, seed=SEED)
    assert all(same(a, b) for a, b in zip(take(stream, 22), reference, strict=True))
    stream.close()


@pytest.mark.slow
@pytest.mark.parametrize("start_method", ["spawn", "forkserver"])
def test_spawned_workers_do_not_change_a_bit(source, reference, start_method):
    settings = config()
    settings.workers = WorkerConfig(count=1, start_method=start_method)
    stream = settings.build(source, seed=SEED)
    assert all(same(a, b) for a, b in zip(take(stream, 4), reference, strict=False))
    stream.close()


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_same_batches(source, reference, world):
    ranks = [take(config().build(source, seed=SEED, rank=rank, world_size=world), 22) for rank in range(world)]
    for step, whole in enumerate(reference):
        assert torch.equal(whole.sample, torch.cat([rank[step].sample for rank in ranks]))
        for view in range(3):
            assert torch.equal(whole.views[view], torch.cat([rank[step].views[view] for rank in ranks]))


@pytest.mark.parametrize("workers", [0, 2])
def test_restore_at_every_step(source, reference, workers):
    # Two workers prepare batches ahead; the state must not count those.
    stream = config(workers).build(source, seed=SEED)
    states = [stream.state_dict()]
    for _ in range(21):
        next(stream)
        states.append(stream.state_dict())
    restored = config(workers).build(source, seed=SEED)
    # Backwards, so that each restore has to undo what the one before it did.
    for step in range(21, -1, -1 if workers == 0 else -4):
        restored.load_state_dict(states[step])
        assert restored.state_dict() == states[step]
        assert same(next(restored), reference[step])
    stream.close()
    restored.close()


def test_layout_may_change_between_steps(source, reference):
    """World size 1, 2, 3, 1 with other workers and batch sizes: each epoch is exact, and the sequence goes on."""
    state, seen, epochs = config().build(source, seed=SEED).state_dict(), [], []
    for world, batch, workers, steps in ((1, 6, 0, 3), (2, 8, 1, 4), (3, 6, 0, 5), (1, 5, 2, 8)):
        streams = [
            config(workers, batch).build(source, seed=SEED, rank=rank, world_size=world) for rank in range(world)
        ]
        for stream in streams:
            stream.load_state_dict(state)
        for _ in range(steps):
            batches = [next(stream) for stream in streams]
            seen += torch.cat([part.sample for part in batches]).tolist()
            epochs += torch.cat([part.epoch for part in batches]).tolist()
        state = streams[0].state_dict()
        assert all(stream.state_dict() == state for stream in streams)
        for stream in streams:
            stream.close()
    assert seen == torch.cat([batch.sample for batch in reference]).tolist()[: len(seen)]
    assert epochs == torch.cat([batch.epoch for batch in reference]).tolist()[: len(epochs)]
    assert len(seen) > 2 * TOTAL


def test_state_is_a_few_integers(source):
    stream = config().build(source, seed=SEED)
    take(stream, 10)
    state = stream.state_dict()
    assert (state["epoch"], state["position"], state["samples"]) == (1, 60 - TOTAL, TOTAL)
    assert all(type(value) is int and -(2**63) <= value < 2**63 for value in state.values())


def test_a_state_of_other_data_is_refused(source, shards):
    stream = config().build(source, seed=SEED)
    fewer = config().build(ShardSource(sorted(shards.glob("*.tar"))[:3]), seed=SEED)
    with pytest.raises(DataError, match="had 30 samples, this source has 53"):
        stream.load_state_dict(fewer.state_dict())
    other = config().build(source, seed=SEED + 1)
    with pytest.raises(DataError, match="another order"):
        stream.load_state_dict(other.state_dict())


def test_moved_data_are_known_again_and_others_refused(source, shards, jpeg, tmp_path):
    stream = config().build(source, seed=SEED)
    take(stream, 3)
    state = stream.state_dict()
    moved = config().build(ShardSource(shutil.copytree(shards, tmp_path / "moved")), seed=SEED)
    moved.load_state_dict(state)
    assert same(next(moved), next(stream))
    # As many in shards of the same sizes, and one image is another.
    write_shards([(jpeg(n + 100 * (n == 52)), n % 7) for n in range(TOTAL)], tmp_path / "other", samples_per_shard=10)
    other = config().build(ShardSource(tmp_path / "other"), seed=SEED)
    with pytest.raises(DataError, match="had other samples than these 53, as many in the same groups"):
        other.load_state_dict(state)
    # A state from before streams said what they hold.
    other.load_state_dict({name: value for name, value in state.items() if name != "contents"})


def test_the_global_generator_is_left_alone(source):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    stream = config(1).build(source, seed=SEED)
    next(stream)
    stream.close()
    assert torch.equal(before, torch.get_rng_state())


def test_cache_does_not_change_a_bit(source, reference):
    for size in (20_000, 10_000_000):
        stream = config(cache_bytes=size).build(source, seed=SEED)
        assert all(same(a, b) for a, b in zip(take(stream, 22), reference, strict=True))
        # All of the images are too large for a view of 4x4 to be decoded at full scale: those are not kept.
        assert len(stream._tasks._cache) == 0
        plain = StreamConfig(global_batch_size=6, window_shards=2, views=(ViewGroup(size=(32, 32)),))
        cached = StreamConfig(
            global_batch_size=6, window_shards=2, views=(ViewGroup(size=(32, 32)),), cache_bytes=size
        ).build(source, seed=SEED)
        assert all(same(a, b) for a, b in zip(take(cached, 22), take(plain.build(source, seed=SEED), 22), strict=True))
        assert len(cached._tasks._cache) == min(TOTAL, size // (4 * 40 * 32 + 1024))


def bad_shards(folder, jpeg, bad):
    """Shards of 40 images; those whose number is a key of ``bad`` are damaged."""
    images = []
    for number in range(40):
        data = jpeg(number, size=(60, 80))
        images.append(
            {"truncated": data[: len(data) // 2], "undecodable": data[:3] + b"junk" * 9}.get(bad.get(number), data)
        )
    return ShardSource(write_shards(images, folder, samples_per_shard=10))


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_images_are_counted_and_replaced(tmp_path, jpeg, workers):
    bad = {3: "truncated", 4: "undecodable", 17: "undecodable"}
    source = bad_shards(tmp_path, jpeg, bad)
    good = config(workers, 8).build(source, seed=3)
    batches = take(good, 5)
    good.close()
    assert good.skipped == {"truncated": 1, "undecodable": 2}
    shown = torch.cat([batch.sample for batch in batches]).tolist()
    assert len(shown) == 40
    planned = np.concatenate([good._order.span(start, 8)[1] for start in range(0, 48, 8)]).tolist()
    for position, sample in enumerate(shown):
        expected = next(s for s in planned[position:] if s not in bad)
        assert sample == expected
    # What a position shows does not depend on the batch that it falls in.
    again = config(0, 5).build(source, seed=3)
    assert torch.cat([batch.sample for batch in take(again, 8)]).tolist() == shown


def test_too_many_damaged_images_stop_the_stream(tmp_path, jpeg):
    source = bad_shards(tmp_path, jpeg, dict.fromkeys(range(20), "undecodable"))
    stream = config(batch=8).build(source, seed=3)
    with pytest.raises(DataError, match=r"1\d images .* undecodable.*max_skipped_fraction=0.01") as caught:
        take(stream, 10)
    assert "\n" not in str(caught.value)
    lenient = config(batch=8, max_skipped_fraction=0.6).build(source, seed=3)
    assert len(take(lenient, 10)) == 10
    assert lenient.skipped == {"undecodable": 40}


def test_the_share_of_a_whole_pass_counts_wherever_a_stream_begins(tmp_path, jpeg):
    """Eleven damaged images of 40 that stand in one shard are 28 %, not all of the first batch."""
    source = bad_shards(tmp_path, jpeg, dict.fromkeys(range(11), "undecodable"))
    for start in range(0, 80, 8):
        stream = config(batch=8, max_skipped_fraction=0.3).build(source, seed=3)
        stream.load_state_dict(stream.state_dict() | {"position": start % 40})
        assert len(take(stream, 5)) == 5


def test_nothing_decodable_is_an_error_not_a_loop(tmp_path, jpeg):
    source = bad_shards(tmp_path, jpeg, dict.fromkeys(range(40), "undecodable"))
    with pytest.raises(DataError, match="1000 images in a row cannot be decoded"):
        next(config(1).build(source, seed=0))


def test_too_large_and_empty_images_are_left_out(tmp_path, jpeg):
    import tarfile

    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in range(12):
            data = b"" if number == 5 else jpeg(number, size=(300, 300) if number == 7 else (40, 40))
            (tmp_path / "image").write_bytes(data)
            tar.add(tmp_path / "image", arcname=f"{number}.jpg")
    stream = config(batch=12, max_pixels=10_000).build(ShardSource(tmp_path / "a.tar"), seed=0)
    next(stream)
    assert stream.skipped == {"empty": 1, "too_large": 1}


def test_a_shard_that_vanishes_stops_the_stream_with_one_line(tmp_path, jpeg):
    paths = write_shards([jpeg(n) for n in range(20)], tmp_path, samples_per_shard=5)
    stream = config(1).build(ShardSource(paths), seed=0)
    paths[2].unlink()
    with pytest.raises(DataError, match="cannot be read") as caught:
        take(stream, 5)
    assert "\n" not in str(caught.value)


def test_wrong_fields_are_refused(source):
    for fields, word in (
        ({"global_batch_size": 0}, "global_batch_size=0"),
        ({"window_shards": 0}, "window_shards=0"),
        ({"views": ()}, "at least one view"),
        ({"max_skipped_fraction": 2.0}, "max_skipped_fraction=2.0"),
        ({"cache_bytes": -1}, "cache_bytes=-1"),
        ({"max_pixels": 0}, "max_pixels=0"),
    ):
        with pytest.raises(ValueError, match=word):
            StreamConfig(**fields)
    with pytest.raises(ValueError, match="multiples of 4"):
        StreamConfig(global_batch_size=6).build(source, seed=0, world_size=4)
    with pytest.raises(ValueError, match="rank=2"):
        StreamConfig(global_batch_size=6).build(source, seed=0, rank=2, world_size=2)
    with pytest.raises(ValueError, match="allowed: auto, fork, spawn, forkserver"):
        WorkerConfig(start_method="thread")
    with pytest.raises(ValueError, match="count=-1"):
        WorkerConfig(count=-1)
    assert StreamConfig(views=[ViewGroup(count=2), ViewGroup()]).num_views == 3
