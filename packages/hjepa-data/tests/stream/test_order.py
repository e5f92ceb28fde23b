import hashlib
import pickle
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hjepa_data import StreamOrder
from hjepa_data.random import hash_int
from hjepa_data.stream.order import permutation

SIZES = np.array([5, 1, 8, 3, 4])
GOLDEN_PERMUTATION = [0, 7, 8, 11, 2, 5, 9, 4, 10, 6, 3, 1]
GOLDEN_ORDER = [
    20,
    14,
    16,
    17,
    15,
    18,
    19,
    9,
    1,
    0,
    10,
    7,
    11,
    13,
    3,
    12,
    2,
    8,
    4,
    6,
    5,
    16,
    14,
    15,
    5,
    8,
    6,
    3,
    1,
    2,
    7,
    10,
    9,
    11,
    0,
    13,
    4,
    12,
    19,
    20,
    18,
    17,
    5,
    15,
]


@given(n=st.integers(1, 3000), seed=st.integers(-(2**63), 2**63), counter=st.integers(0, 2**40))
def test_permutation_is_bijective(n, seed, counter):
    order = permutation(n, seed, counter)
    assert np.array_equal(np.sort(order), np.arange(n))


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    window=st.integers(1, 15),
    seed=st.integers(0, 2**32),
    epoch=st.integers(0, 10**6),
)
def test_each_epoch_holds_each_sample_once(sizes, window, seed, epoch):
    order = StreamOrder(np.array(sizes), window, seed)
    total = sum(sizes)
    epochs, samples = order.span(epoch * total, total)
    assert set(epochs.tolist()) == {epoch}
    assert sorted(samples.tolist()) == list(range(total))


@given(start=st.integers(0, 200), parts=st.lists(st.integers(1, 30), min_size=1, max_size=8), window=st.integers(1, 6))
def test_any_split_gives_the_same_order(start, parts, window):
    whole = StreamOrder(SIZES, window, 3).span(start, sum(parts))
    order = StreamOrder(SIZES, window, 3)
    split = [order.span(start + sum(parts[:i]), part) for i, part in enumerate(parts)]
    for column in range(2):
        assert whole[column].tolist() == np.concatenate([piece[column] for piece in split]).tolist()


def test_golden_order():
    # Stored from the first release: a saved run continues only if these never change.
    assert permutation(12, 0, 0).tolist() == GOLDEN_PERMUTATION
    epochs, samples = StreamOrder(SIZES, 2, 1234).span(0, 44)
    assert epochs.tolist() == [0] * 21 + [1] * 21 + [2] * 2
    assert samples.tolist() == GOLDEN_ORDER


def test_golden_order_of_many():
    # The same for sizes that people have; sha256 of the int64 numbers, little-endian.
    def digest(numbers):
        return hashlib.sha256(numbers.astype("<i8").tobytes()).hexdigest()[:16]

    assert digest(permutation(100_003, 2**40 + 1, 7, 2, 9)) == "36e704fbd05fcf62"
    sizes = np.arange(1000) % 97 + 900
    order = StreamOrder(sizes, 16, 42)
    assert digest(order.span(int(sizes.sum()) * 3 - 50_000, 100_000)[1]) == "d4979c9a3de8f002"
    assert order.fingerprint == 4_599_084_652_879_098_419


@given(n=st.integers(0, 3000), seed=st.integers(-(2**70), 2**70), counters=st.lists(st.integers(0, 2**40), max_size=3))
def test_permutation_is_a_bijection_and_the_order_of_its_hashes(n, seed, counters):
    found = permutation(n, seed, *counters)
    assert sorted(found.tolist()) == list(range(n))
    hashes = [hash_int(seed, *counters, number) for number in range(n)]
    assert found.tolist() == sorted(range(n), key=hashes.__getitem__)


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12), window=st.integers(1, 15), seed=st.integers(0, 99))
def test_windows_are_whole_and_follow_one_another(sizes, window, seed):
    order = StreamOrder(np.array(sizes), window, seed)
    total, starts = sum(sizes), np.cumsum([0, *sizes])
    windows = order.windows_from(0, 2 * -(-len(sizes) // window))
    for epoch in (0, 1):
        shown, seen = order.span(epoch * total, total)[1], 0
        of_epoch = [shards for (number, _), shards in windows if number == epoch]
        assert sorted(np.concatenate(of_epoch).tolist()) == list(range(len(sizes)))
        for shards in of_epoch:
            held = [n for shard in shards for n in range(starts[shard], starts[shard + 1])]
            assert sorted(shown[seen : seen + len(held)].tolist()) == sorted(held)
            seen += len(held)


def test_window_holds_whole_shards():
    order = StreamOrder(np.full(12, 10), 3, 0)
    samples = order.span(0, 120)[1]
    for first in range(0, 120, 30):
        shards = np.unique(samples[first : first + 30] // 10)
        assert len(shards) == 3


def test_epochs_and_seeds_differ_and_places_are_uniform():
    order = StreamOrder(np.full(10, 20), 4, 0)
    assert order.span(0, 200)[1].tolist() != order.span(200, 200)[1].tolist()
    assert order.span(0, 200)[1].tolist() != StreamOrder(np.full(10, 20), 4, 1).span(0, 200)[1].tolist()
    places = np.stack([np.argsort(order.span(epoch * 200, 200)[1]) for epoch in range(400)])
    # The mean place of a sample over 400 epochs has a standard deviation of 200 / sqrt(12 * 400).
    assert np.abs(places.mean(0) - 99.5).max() < 5 * 200 / (12 * 400) ** 0.5


def test_fingerprint_tells_orders_apart():
    base = StreamOrder(SIZES, 2, 5).fingerprint
    assert base == StreamOrder(SIZES.copy(), 2, 5).fingerprint
    others = [StreamOrder(SIZES[::-1].copy(), 2, 5), StreamOrder(SIZES, 3, 5), StreamOrder(SIZES, 2, 6)]
    assert base not in {other.fingerprint for other in others}
    assert 0 <= base < 2**63


def test_middle_of_ten_million_samples_is_found_at_once():
    order = StreamOrder(np.full(1000, 10_000), 16, 0)
    begin = time.process_time()
    epochs, samples = order.span(7_654_321 + 3 * 10_000_000, 256)
    assert time.process_time() - begin < 1
    assert len(set(samples.tolist())) == 256
    assert set(epochs.tolist()) == {3}


def test_caches_stay_small_and_at_home():
    order = StreamOrder(np.full(50, 4), 2, 0)
    order.span(0, 1000)
    assert len(order._windows) <= 4
    assert len(order._layouts) <= 2
    assert len(pickle.dumps(order)) < len(pickle.dumps(StreamOrder(np.full(50, 4), 2, 0))) + 100


def test_window_of_nothing_is_refused():
    with pytest.raises(ValueError, match="window_shards=0"):
        StreamOrder(SIZES, 0, 0)
