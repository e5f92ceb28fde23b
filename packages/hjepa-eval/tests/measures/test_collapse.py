import pytest
import torch

from hjepa_eval import (
    CollapseConfig,
    FeatureSet,
    Verdict,
    evaluate,
    judge_collapse,
    judge_levels,
    measure_unlabelled,
)


def normal(n=600, width=64, seed=0):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def test_what_varies_in_all_directions_is_healthy(device):
    report = judge_collapse(normal().to(device))
    assert (report.verdict, report.reasons, report.n) == (Verdict.healthy, (), 600)


@pytest.mark.parametrize(
    ("change", "verdict", "reason"),
    [
        (lambda z: torch.full_like(z, 2.5), "collapsed", "hardly differ"),
        (torch.zeros_like, "collapsed", "hardly differ"),
        (lambda z: 1e-3 * z + 1, "collapsed", "hardly differ"),
        (lambda z: z[:, :1] * z[:1], "collapsed", "few directions"),
        (lambda z: z[:, :4] @ z[:4], "poor", "few directions"),
        (lambda z: z * (torch.arange(64, device=z.device) < 48), "poor", "constant"),
        (lambda z: z + 8, "poor", "same way"),
    ],
)
def test_each_kind_of_collapse_is_named_with_its_number(device, change, verdict, reason):
    report = judge_collapse(change(normal().to(device)))
    assert report.verdict == verdict
    assert any(reason in line for line in report.reasons)
    assert all(any(character.isdigit() for character in line) for line in report.reasons)


@pytest.mark.parametrize("width", [2, 4, 8, 32])
def test_one_direction_is_a_collapse_at_every_width(device, width):
    z = normal(width=width).to(device)
    assert judge_collapse(z).verdict == Verdict.healthy
    report = judge_collapse(z[:, :1] @ z[:1] + 1e-3 * z)
    assert report.verdict == Verdict.collapsed
    assert "few directions" in report.reasons[0]


def test_a_single_number_an_image_lacks_no_direction():
    assert judge_collapse(normal(width=1)).verdict == Verdict.healthy


def test_every_level_has_its_own_verdict():
    labels = torch.full((600,), -1)
    sets = {"0": FeatureSet(values=normal(), labels=labels), "1": FeatureSet(values=torch.ones(600, 8), labels=labels)}
    assert {level: report.verdict for level, report in judge_levels(sets).items()} == {
        "0": Verdict.healthy,
        "1": Verdict.collapsed,
    }


def test_bounds_are_checked():
    with pytest.raises(ValueError, match="rank_share"):
        CollapseConfig(rank_share=(0.01, 0.1))
    with pytest.raises(ValueError, match="cosine"):
        CollapseConfig(cosine=(0.99, 0.9))
    with pytest.raises(ValueError, match="two samples"):
        judge_collapse(torch.zeros(1, 3))


def test_all_numbers_come_with_intervals_and_counts():
    features = FeatureSet(values=normal(), labels=torch.full((600,), -1))
    found = {one.metric: one for one in measure_unlabelled(features, samples=500)}
    assert set(found) == {"rankme", "effective_rank", "alpha_req", "isotropy", "spread", "mean_cosine", "uniformity"}
    for one in found.values():
        assert one.low < one.value < one.high
        assert (one.n, one.method) == (500, "jackknife")
    assert found["effective_rank"].details["verdict"] == "healthy"
    # The deviation of a standard normal is known: the interval must hold it, and be narrow.
    assert found["spread"].low < 1.0 < found["spread"].high
    assert found["spread"].high - found["spread"].low < 0.05


def test_few_samples_of_a_set_in_order_of_its_classes_are_of_all_classes():
    """Fifty classes in twenty-five dimensions: a tenth of the samples, taken from the start, would be of five."""
    labels = torch.arange(50).repeat_interleave(40)
    one = FeatureSet(values=4 * normal(50, 25)[labels] + 0.1 * normal(2000, 25), labels=labels)
    some = one.some(200).labels
    assert len(some) == 200
    assert len(some.unique()) >= 45
    assert torch.equal(some, some.sort().values)
    in_turns = FeatureSet(values=torch.eye(10).repeat(200, 1), labels=torch.arange(2000) % 10)
    assert len(in_turns.some(200).labels.unique()) == 10
    assert torch.equal(one.some(200).values, one.some(200).values)
    assert torch.equal(one.some(5000).values, one.values)
    assert judge_levels({"0": one}, samples=200)["0"].n == 200
    assert judge_levels({"0": one}, samples=200)["0"].numbers["rank_share"] > 0.7
    found = {number.metric: number.value for number in measure_unlabelled(one, samples=200)}
    assert found["effective_rank"] > 0.7 * 25
    one.labels = torch.full((2000,), -1)
    assert evaluate(one, one, rank_samples=200).effective_rank == pytest.approx(found["effective_rank"])
