import math
import statistics
from dataclasses import replace

import pytest
import torch

from hjepa_eval import (
    FeatureName,
    FeatureSet,
    bootstrap,
    cka_interval,
    interval_of_mean,
    jackknife,
    measure_unlabelled,
    rankme,
)
from hjepa_eval.measures.report import RANGES
from hjepa_eval.results.interval import group_of_each


def test_bootstrap_of_a_share_is_near_the_binomial_interval():
    right = (torch.arange(400) < 300).double()
    found = bootstrap(right, draws=4000)
    half = 1.96 * math.sqrt(0.75 * 0.25 / 400)
    assert (found.value, found.n, found.method) == (0.75, 400, "bootstrap")
    assert found.low == pytest.approx(0.75 - half, abs=0.006)
    assert found.high == pytest.approx(0.75 + half, abs=0.006)
    assert bootstrap(right) == bootstrap(right) != bootstrap(right, seed=1)
    with pytest.raises(ValueError, match="none"):
        bootstrap(right[:0])


@pytest.mark.parametrize("n", [1, 12, 500])
def test_none_and_all_right_have_the_ends_of_clopper_and_pearson(n):
    from scipy.stats import binomtest

    for right in (0, 1):
        found = bootstrap(torch.full((n,), bool(right)))
        exact = binomtest(right * n, n).proportion_ci(0.95, method="exact")
        assert (found.low, found.high) == pytest.approx((exact.low, exact.high), abs=1e-12)
        assert (found.value, found.n, found.method) == (right, n, "bootstrap")
    # Differences are numbers: none that differs is no share.
    equal = bootstrap(torch.zeros(n))
    assert equal.low == equal.high == 0


def test_bootstrap_holds_the_truth_nineteen_times_in_twenty():
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for trial in range(200):
        found = bootstrap((torch.rand(150, generator=generator) < 0.6).double(), draws=300, seed=trial)
        hits += found.low <= 0.6 <= found.high
    assert 180 <= hits <= 199


def test_bootstrap_of_a_statistic_of_several_numbers():
    rows = torch.stack((torch.arange(50.0), torch.full((50,), 2.0)), dim=1)
    found = bootstrap(rows, lambda mean: mean[:, 0] / mean[:, 1])
    assert found.value == pytest.approx(24.5 / 2)
    assert found.low < found.value < found.high


def test_an_interval_over_seeds_is_students():
    values = [0.5, 0.52, 0.57]
    found = interval_of_mean(values)
    half = 4.303 * statistics.stdev(values) / math.sqrt(3)
    assert (found.value, found.high - found.value) == pytest.approx((statistics.fmean(values), half))
    assert (found.n, found.method) == (3, "seeds")
    with pytest.raises(ValueError, match="two repetitions"):
        interval_of_mean([1.0])


def test_jackknife_of_a_mean_is_its_standard_error():
    z = torch.randn(1000, generator=torch.Generator().manual_seed(0)).double()
    found = jackknife(z, lambda x: x.mean())
    group_of = group_of_each(1000, 10)
    assert group_of.bincount().tolist() == [100] * 10
    groups = [z[group_of == i].mean().item() for i in range(10)]
    error = statistics.stdev(groups) / math.sqrt(10)
    assert found.high - found.value == pytest.approx(2.262 * error)
    rank = jackknife(torch.randn(300, 20, generator=torch.Generator().manual_seed(1)), rankme)
    assert 15 < rank.low < rank.value < rank.high < 21
    with pytest.raises(ValueError, match="groups"):
        jackknife(z[:19], lambda x: x.mean())


def test_a_statistic_that_some_draw_leaves_undefined_has_no_ends():
    rows = torch.eye(8)[:, :2]
    found = bootstrap(rows, lambda mean: mean[:, 0] / mean[:, 1])
    assert (found.value, found.method, found.n) == (1, "none", 8)
    assert math.isnan(found.low)
    assert math.isnan(found.high)


def test_an_interval_ends_where_its_measure_does():
    z = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)).double()
    plain = jackknife(z, lambda x: x[:, 0].mean())
    for within in ((plain.low + 0.01, plain.high - 0.01), (plain.low - 1, plain.high + 1)):
        found = jackknife(z, lambda x: x[:, 0].mean(), within=within)
        assert found == replace(plain, low=max(plain.low, within[0]), high=min(plain.high, within[1]))
    # Few and uneven samples, whose numbers lie near the ends.
    few = torch.cat((torch.ones(20, 3), torch.eye(3)))
    labels = torch.zeros(23).long()
    found = {one.metric: one for one in measure_unlabelled(FeatureSet(values=few, labels=labels, name=FeatureName()))}
    for metric, (least, most) in RANGES.items():
        if metric != "alpha_req":
            assert least <= found[metric].low <= found[metric].value <= found[metric].high <= most, metric
    assert cka_interval(few, few[:, :1]).high <= 1
    assert cka_interval(few, few.flip(0)).low >= 0


def test_groups_of_samples_in_turns_of_ten_classes_hold_all_classes():
    classes = torch.arange(1000) % 10
    z = classes.double()
    found = jackknife(z, lambda x: x.mean())
    assert all(len(classes[group_of_each(1000, 10) == group].unique()) == 10 for group in range(10))
    # A group a class would make it 3.3 times as wide as the standard error of the mean, and more.
    assert found.high - found.low < 4 * 1.96 * float(z.std()) / math.sqrt(1000)


def test_quantiles_of_many_repetitions_are_students():
    from scipy.stats import t

    for count in (10, 32, 50, 200):
        values = [float(i % 7) for i in range(count)]
        found = interval_of_mean(values)
        half = t.ppf(0.975, count - 1) * statistics.stdev(values) / math.sqrt(count)
        assert found.high - found.value == pytest.approx(half, rel=3e-4)


def test_what_is_not_a_number_stays_none_and_groups_are_counted():
    assert math.isnan(interval_of_mean([0.5, math.nan]).value)
    assert math.isnan(interval_of_mean([0.5, math.nan]).low)
    with pytest.raises(ValueError, match="groups=1"):
        jackknife(torch.zeros(9, 2), rankme, groups=1)


def test_a_bootstrap_needs_a_draw():
    with pytest.raises(ValueError, match="draws=0"):
        bootstrap(torch.ones(3), draws=0)
