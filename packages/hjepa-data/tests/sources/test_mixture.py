import itertools
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hjepa_data import (
    DataError,
    FileSource,
    FolderSource,
    MixtureSource,
    ShardSource,
    StreamConfig,
    ViewGroup,
    write_shards,
)
from hjepa_data.sources.mixture import shares_of
from hjepa_data.stream.order import MixtureOrder, StreamOrder, order_of

GOLDEN_SAMPLES = [21, 8, 0, 13, 7, 12, 19, 11, 10, 18, 14, 22, 3, 1, 6, 20, 4, 9, 2, 5, 9, 7, 16, 21]
GOLDEN_EPOCHS = [
    2573,
    2941,
    2941,
    2941,
    2941,
    2941,
    2573,
    2941,
    2941,
    2573,
    2746,
    2573,
    2941,
    2941,
    2941,
    2573,
    2941,
    2941,
    2941,
    2941,
    2942,
    2942,
    2746,
    2574,
]


class Rows:
    """A source without images."""

    def __init__(self, *sizes):
        self.group_sizes = np.array(sizes)
        self.labels = np.arange(sum(sizes))

    def __len__(self):
        return len(self.labels)


def mixture_order(sizes, shares, seed=7, window=2):
    orders = [StreamOrder(np.array(part), window, seed + number) for number, part in enumerate(sizes)]
    return MixtureOrder(orders, [len(part) for part in sizes], np.array(shares), seed), orders


SIZES = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=4)


@given(sizes=SIZES, shares=st.lists(st.integers(1, 12), min_size=4, max_size=4), start=st.integers(0, 300))
def test_each_source_goes_on_in_its_own_order(sizes, shares, start):
    """The oracle walks from position 0 and counts; ``span`` computes."""
    order, parts = mixture_order(sizes, shares[: len(sizes)])
    first = np.cumsum([0, *map(sum, sizes)])
    epochs, samples = order.span(0, start + 100)
    sources = np.searchsorted(first, samples, side="right") - 1
    shown = Counter()
    for source, epoch, sample in zip(sources.tolist(), epochs.tolist(), samples.tolist(), strict=True):
        assert parts[source].at(shown[source]) == (epoch, sample - first[source])
        shown[source] += 1
    later = order.span(start, 100)
    assert later[0].tolist() == epochs[start:].tolist()
    assert later[1].tolist() == samples[start:].tolist()
    assert order.at(start) == (epochs[start], samples[start])
    assert [len(column) for column in order.span(start, 0)] == [0, 0]


@given(sizes=SIZES, shares=st.lists(st.integers(1, 12), min_size=4, max_size=4), block=st.integers(0, 1000))
def test_each_block_holds_exactly_the_shares(sizes, shares, block):
    order, _ = mixture_order(sizes, shares[: len(sizes)])
    size = sum(shares[: len(sizes)])
    first = np.cumsum([0, *map(sum, sizes)])
    sources = np.searchsorted(first, order.span(block * size, size)[1], side="right") - 1
    assert np.bincount(sources, minlength=len(sizes)).tolist() == shares[: len(sizes)]


@given(weights=st.lists(st.floats(1, 100), min_size=1, max_size=6))
def test_shares_are_the_weights_within_one_position(weights):
    shares = shares_of(weights)
    assert shares.sum() == 10_000
    assert np.abs(shares - np.array(weights) / sum(weights) * 10_000).max() < 1


def test_places_in_a_block_are_mixed():
    order = order_of(MixtureSource([Rows(50), Rows(50)], [1, 3]), 1, 0)
    first = np.stack([order.span(block * 10_000, 10_000)[1] < 50 for block in range(20)])
    assert (first.sum(1) == 2500).all()
    # Batches of 250: hypergeometric, standard deviation 6.8.
    in_batches = first.reshape(-1, 250).sum(1)
    assert np.abs(in_batches - 62.5).max() < 5 * 6.8
    assert 5.5 < in_batches.std() < 8.1
    assert not np.array_equal(first[0], first[1])


def test_golden_mixture():
    # A saved run continues only if these never change.
    order = order_of(MixtureSource([Rows(5, 1, 8), Rows(3), Rows(4, 4)], [5, 1, 2.5]), 2, 1234)
    epochs, samples = order.span(70_000, 24)
    assert samples.tolist() == GOLDEN_SAMPLES
    assert epochs.tolist() == GOLDEN_EPOCHS


def test_windows_of_a_mixture_are_those_of_its_sources():
    order, parts = mixture_order([[3, 4, 5], [2, 2]], [3, 1])
    before = Counter(np.searchsorted([12], order.span(0, 29)[1], side="right").tolist())
    expected = [
        ((source, *key), (groups + 3 * source).tolist())
        for source, part in enumerate(parts)
        for key, groups in part.windows_from(before[source], 2)
    ]
    assert [(key, groups.tolist()) for key, groups in order.windows_from(29, 2)] == expected


def test_fingerprints_tell_mixtures_apart():
    def fingerprint(sources, weights, seed=0, window=2):
        return order_of(MixtureSource(sources, weights), window, seed).fingerprint

    two = [Rows(5, 6), Rows(7)]
    base = fingerprint(two, [1, 2])
    assert base == fingerprint(two, [2, 4]) == fingerprint([Rows(5, 6), Rows(7)], (0.5, 1.0))
    others = [
        fingerprint(two, [1, 3]),
        fingerprint(two, None),
        fingerprint(two[::-1], [1, 2]),
        fingerprint([Rows(6, 5), Rows(7)], [1, 2]),
        fingerprint(two, [1, 2], seed=1),
        fingerprint(two, [1, 2], window=3),
    ]
    assert len({base, *others}) == 7
    assert 0 <= base < 2**63


def test_without_weights_it_is_one_source():
    source = MixtureSource([Rows(5, 6), Rows(7)])
    order = order_of(source, 2, 3)
    assert order.span(0, 40)[1].tolist() == StreamOrder(np.array([5, 6, 7]), 2, 3).span(0, 40)[1].tolist()
    assert source.source_of(np.array([0, 10, 11, 17])).tolist() == [0, 0, 1, 1]


def test_a_mixture_of_mixtures():
    inner = MixtureSource([Rows(4), Rows(6)], [1, 1])
    order = order_of(MixtureSource([inner, Rows(10)], [2, 1]), 1, 0)
    shown = np.bincount(np.searchsorted([4, 10], order.span(0, 30_000)[1], side="right"))
    # Two thirds of 10,000 are 6,667, three times; of the 20,001 the inner mixture begins a block with the last one.
    assert shown[2] == 9_999
    assert sorted(shown[:2].tolist()) == [10_000, 10_001]


def test_wrong_weights():
    sources = [Rows(3), Rows(4)]
    for weights, words in (
        ([1], r"weights=\[1\]: there are 2 sources"),
        ([1, 0], r"weights=\[1, 0\]: not all of them are positive"),
        ([1, -1], "not all of them are positive"),
        ([1, float("nan")], "not all of them are positive"),
        ([1, float("inf")], "not all of them are positive"),
        ([1e6, 1], "a source would never be shown"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            MixtureSource(sources, weights)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="nothing to mix"):
        MixtureSource([])


@pytest.fixture
def mixed(pets, tmp_path, jpeg):
    shards = ShardSource(write_shards([(jpeg(100 + n), n) for n in range(17)], tmp_path, samples_per_shard=4))
    return MixtureSource([FolderSource(pets), shards], [3, 1])


def stream_of(source, batch=8, seed=5, **layout):
    return StreamConfig(global_batch_size=batch, window_shards=2, views=(ViewGroup(size=(8, 8)),)).build(
        source, seed=seed, **layout
    )


def test_samples_labels_and_places_are_those_of_the_sources(mixed, pets, jpeg):
    folder, shards = mixed.sources
    assert len(mixed) == 48
    assert [mixed.read(n).image for n in range(31)] == [folder.read(n).image for n in range(31)]
    assert [mixed.read(31 + n).image for n in range(17)] == [jpeg(100 + n) for n in range(17)]
    assert mixed.labels.tolist() == folder.labels.tolist() + list(range(17))
    assert (mixed.locate(3), mixed.locate(33)) == (folder.locate(3), shards.locate(2))
    assert mixed.group_sizes.tolist() == [31, 4, 4, 4, 4, 1]
    for index in (-1, 48):
        with pytest.raises(IndexError):
            mixed.read(index)
    copy = pickle.loads(pickle.dumps(mixed))
    assert (copy.read(40).image, copy.labels.tolist()) == (mixed.read(40).image, mixed.labels.tolist())


def test_groups_are_read_ahead_by_their_sources(mixed, monkeypatch):
    asked = []
    monkeypatch.setattr(ShardSource, "read_ahead", lambda self, shards: asked.append(list(shards)))
    mixed.read_ahead([2, 0, 5])
    assert asked == [[1, 4]]
    mixed.close()


def test_state_of_a_mixture_goes_on_anywhere(mixed):
    whole = stream_of(mixed)
    batches, states = [], [whole.state_dict()]
    for _ in range(14):
        batches.append(next(whole))
        states.append(whole.state_dict())
    assert all(type(value) is int and -(2**63) <= value < 2**63 for value in states[-1].values())
    samples, epochs = (torch.cat([getattr(b, name) for b in batches]).numpy() for name in ("sample", "epoch"))
    folder = mixed.source_of(samples) == 0
    # 112 of 10,000 positions: about 84 of the folder's 31 images, 28 of the 17 in shards, each in epochs of their own.
    for part, size in ((folder, 31), (~folder, 17)):
        assert part.sum() > size
        assert len(set(samples[part][:size].tolist())) == size
        assert set(epochs[part][:size].tolist()) == {0}
        assert epochs[part][size] == 1
    for step, state in enumerate(states[:-1]):
        ranks = [stream_of(mixed, rank=rank, world_size=2) for rank in range(2)]
        for rank in ranks:
            rank.load_state_dict(state)
        parts = [next(rank) for rank in ranks]
        assert torch.equal(torch.cat([part.sample for part in parts]), batches[step].sample)
        assert torch.equal(torch.cat([part.views[0] for part in parts]), batches[step].views[0])
        assert torch.equal(torch.cat([part.labels for part in parts]), batches[step].labels)
    other = stream_of(MixtureSource(mixed.sources, [3, 2]))
    with pytest.raises(DataError, match="another order; give the same source, seed, window_shards and weights"):
        other.load_state_dict(states[3])


def test_a_damaged_image_of_one_source_is_replaced(pets, tmp_path, jpeg):
    images = [jpeg(n) for n in range(8)]
    images[3] = images[3][:40]
    source = MixtureSource([FolderSource(pets), ShardSource(write_shards(images, tmp_path))], [1, 1])
    stream = stream_of(source)
    seen = torch.cat([batch.sample for batch in itertools.islice(stream, 5)]).tolist()
    assert 31 + 3 not in seen
    assert len(seen) == 40
    assert sum(stream.skipped.values()) >= 1


def test_weights_that_would_not_count_are_refused(shards):
    source = ShardSource(shards)
    weighted = MixtureSource([source, source], weights=[9, 1])
    with pytest.raises(ValueError, match=r"^weights=None: a source is a mixture whose own weights would not count"):
        MixtureSource([weighted, source])
    assert isinstance(order_of(MixtureSource([weighted, source], weights=[1, 1]), 4, 0), MixtureOrder)


def test_a_source_without_samples_is_refused_when_the_stream_is_built():
    empty = FileSource([], np.empty(0, dtype=np.int64))
    with pytest.raises(DataError, match="the FileSource has no samples"):
        StreamConfig(views=(ViewGroup(size=(8, 8)),)).build(empty, seed=0)
