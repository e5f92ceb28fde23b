import math
import re
from dataclasses import replace

import pytest
import torch

from hjepa_eval import (
    FeatureName,
    FeatureSet,
    LogisticProbeConfig,
    Results,
    Whitening,
    evaluate,
    format_table,
    knn_accuracy,
    measure_unlabelled,
)
from hjepa_eval.results.measurement import to_json

NAME = FeatureName(branch="target", level="1", pooling="mean")


def blobs(n, seed, labelled=True):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (n,), generator=generator)
    values = 2 * torch.eye(3, 6)[labels] + torch.randn(n, 6, generator=generator)
    return FeatureSet(values=values, labels=labels if labelled else torch.full((n,), -1), name=NAME)


def test_scores_hold_the_numbers_of_the_parts_and_their_counts(device):
    train, test = blobs(200, 0), blobs(100, 1)
    scores = evaluate(train, test, ks=(5, 20), probe=LogisticProbeConfig(l2=(1e-2,)), rank_samples=150, device=device)
    assert (scores.n_train, scores.n_test, scores.n_rank, scores.width) == (200, 100, 150, 6)
    expected = knn_accuracy(train.values, train.labels, test.values, test.labels, ks=(5, 20))
    assert scores.knn == pytest.approx(expected, abs=1e-6)
    white = Whitening.fit(train.values)
    expected = knn_accuracy(white(train.values), train.labels, white(test.values), test.labels, ks=(5, 20))
    _, knn, *whitened, linear, rank, effective, spread = scores.measurements()
    assert {one.metric: one.value for one in whitened} == pytest.approx(
        {f"white_knn_{k}": expected[k] for k in (5, 20)}, abs=1e-6
    )
    ranks = (rank, effective, spread)
    assert (knn.metric, knn.value, knn.n, knn.n_train) == ("knn_20", scores.knn[20], 100, 200)
    assert knn.low < knn.value < knn.high
    assert (linear.metric, linear.method) == ("linear", "bootstrap")
    assert scores.linear is not None
    assert 0.7 < scores.linear < 1.0
    assert scores.linear_l2 == 1e-2
    assert 5 < scores.effective_rank <= 6
    expected = {one.metric: one for one in measure_unlabelled(train, samples=150, device=device)}
    assert [one.metric for one in ranks] == ["rankme", "effective_rank", "spread"]
    for one in ranks:
        assert replace(one, details={}) == replace(expected[one.metric], details={})
        assert one.low < one.value < one.high
    for one in scores.measurements():
        assert (one.name, one.details["width"]) == (NAME, 6)


def test_ranks_of_few_samples_have_no_interval_and_none_are_measured_where_none_are_asked_for():
    few, none = evaluate(blobs(19, 0), blobs(30, 1)), evaluate(blobs(60, 0), blobs(30, 1), rank_samples=0)
    interval = few.intervals["rankme"]
    assert (interval.method, math.isnan(interval.low), interval.n) == ("none", True, 19)
    assert (none.rankme, none.effective_rank, none.n_rank) == (None, None, 0)
    assert [one.metric for one in none.measurements()] == ["knn_20", "white_knn_20", "linear"]
    assert format_table([none]).splitlines()[-1].endswith("| - | - | 60/30/0 |")
    assert to_json(Results(model="m", data="d", measurements=few.measurements()))["measurements"][3]["low"] is None


def test_votes_have_the_temperature_that_is_asked_for(device):
    train, test = blobs(200, 0), blobs(300, 1)
    found = {t: evaluate(train, test, ks=(50,), temperature=t, device=device).knn[50] for t in (0.02, 10.0)}
    for temperature, value in found.items():
        expected = knn_accuracy(train.values, train.labels, test.values, test.labels, ks=(50,), temperature=temperature)
        assert value == pytest.approx(expected[50])
    assert found[0.02] != found[10.0]


def test_unlabelled_samples_count_for_ranks_only(device):
    train, test = blobs(200, 0), blobs(100, 1)
    train.labels[:50] = -1
    scores = evaluate(train, test, device=device)
    assert (scores.n_train, scores.n_rank) == (150, 200)
    none = evaluate(blobs(50, 0, labelled=False), test, device=device)
    assert (none.n_train, none.knn, none.linear) == (0, {}, None)
    assert none.rankme > 1


def test_a_measurement_says_what_was_chosen(device):
    scores = evaluate(blobs(200, 0), blobs(100, 1), device=device)
    found = {one.metric: one for one in scores.measurements()}
    assert found["linear"].details["l2"] == scores.linear_l2
    assert found["linear"].n_train == 200
    assert "l2" not in found["knn_20"].details


def test_a_k_larger_than_the_bank_is_left_out(device):
    scores = evaluate(blobs(10, 0), blobs(10, 1), ks=(5, 20), device=device)
    assert set(scores.knn) == {5}


def test_table_names_branch_level_pooling_and_counts():
    full = evaluate(blobs(60, 0), blobs(30, 1))
    table = format_table([full, evaluate(blobs(60, 0, labelled=False), blobs(30, 1))]).splitlines()
    header = "branch | level | pooling | D | kNN k=20 | whitened k=20 | linear | RankMe | eff. rank | n train/test/rank"
    assert table[0] == f"| {header} |"
    assert re.match(r"\| target \| 1 \| mean \| 6 \|( \d\.\d{3}±\.\d{3} \|){5} 60/30/60 \|$", table[2])
    assert "| - | - |" in table[3]


def test_features_of_two_kinds_are_refused():
    other = blobs(20, 1)
    other.name = FeatureName(level="0")
    with pytest.raises(ValueError, match="not the same features"):
        evaluate(blobs(20, 0), other)
