import numpy as np
import pytest
import torch
from sklearn.linear_model import Lasso, Ridge

from hjepa_eval import LogisticProbeConfig, bottleneck_sweep, dci, factor_probe
from hjepa_eval.factors import dci as module
from hjepa_eval.factors.dci import lasso
from hjepa_eval.factors.probes import _ridge
from hjepa_eval.results.interval import group_of_each

ONE = LogisticProbeConfig(l2=(1e-3,))


def world(n, seed):
    """Known factors: a class of four, a position in the plane, a scale; all independent."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "class": torch.randint(0, 4, (n,), generator=generator),
        "place": torch.rand(n, 2, generator=generator),
        "scale": torch.rand(n, generator=generator),
    }


def code(factors):
    hot = torch.nn.functional.one_hot(factors["class"], 4).float()
    return torch.cat((hot, factors["place"], factors["scale"][:, None]), dim=1)


def separate(factors):
    return {
        "class": factors["class"],
        "y": factors["place"][:, 0],
        "x": factors["place"][:, 1],
        "scale": factors["scale"],
    }


def test_factors_that_features_hold_are_read_and_others_are_at_chance(device):
    train, test = world(600, 0), world(500, 1)
    x, test_x = code(train), code(test)
    x[:, 6], test_x[:, 6] = 0.5, 0.5
    scores = {s.factor: s for s in factor_probe(x.to(device), train, test_x.to(device), test, probe=ONE)}
    assert (scores["class"].kind, scores["class"].interval.value) == ("accuracy", 1.0)
    assert scores["class"].chance == pytest.approx(0.25, abs=0.06)
    assert scores["place"].kind == "r2"
    assert scores["place"].interval.value == pytest.approx(1, abs=1e-3)
    assert scores["scale"].interval.value == pytest.approx(0, abs=0.05)
    assert scores["scale"].interval.low < scores["scale"].interval.value < scores["scale"].interval.high
    assert scores["scale"].interval.n == 500
    with pytest.raises(ValueError, match="place"):
        factor_probe(x, train, test_x, {"class": test["class"]}, probe=ONE)


def test_ridge_and_lasso_equal_scikit_learn(device):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(80, 6, generator=generator).double()
    x[:, 1] = x[:, 0] + 0.1 * x[:, 1]
    y = x @ torch.randn(6, 2, generator=generator).double() + 0.5 * torch.randn(80, 2, generator=generator).double() + 3
    ours = _ridge(x.to(device), y.to(device), x[:5].to(device), 0.1).cpu()
    np.testing.assert_allclose(ours, Ridge(alpha=8.0).fit(x, y).predict(x[:5]), rtol=1e-8)
    x, y = x - x.mean(0), y - y.mean(0)
    penalty = torch.tensor([0.1, 0.5], dtype=torch.float64)
    ours = lasso(x.to(device), y.to(device), penalty.to(device), iterations=5000).cpu()
    for column in range(2):
        theirs = Lasso(alpha=float(penalty[column]), fit_intercept=False, tol=1e-12, max_iter=100_000)
        np.testing.assert_allclose(ours[:, column], theirs.fit(x, y[:, column]).coef_, atol=1e-6)
    assert (ours == 0).any()
    # Nearly dependent dimensions, as features of networks are, and a small penalty.
    x = torch.randn(500, 60, generator=generator).double() * torch.logspace(0, -2.5, 60)
    x = x @ torch.linalg.qr(torch.randn(60, 60, generator=generator).double()).Q
    x = (x - x.mean(0)) / x.std(0)
    y = x @ torch.randn(60, 1, generator=generator).double() + torch.randn(500, 1, generator=generator).double()
    y = y - y.mean(0)
    ours = lasso(x.to(device), y.to(device), torch.tensor([2e-3], dtype=torch.float64, device=device)).cpu()
    theirs = Lasso(alpha=2e-3, fit_intercept=False, tol=1e-10, max_iter=100_000).fit(x, y[:, 0])
    np.testing.assert_allclose(ours[:, 0], theirs.coef_, atol=1e-3)


def test_a_code_of_the_factors_is_disentangled_and_a_rotation_of_it_is_not(device):
    train, test = world(1500, 0), world(800, 1)
    names = ("y", "x", "scale")
    factors, test_factors = ({n: separate(w)[n] for n in names} for w in (train, test))
    plain, test_plain = (torch.stack(list(f.values()), dim=1) for f in (factors, test_factors))
    found = dci(plain.to(device), factors, test_plain.to(device), test_factors)
    assert found.disentanglement == pytest.approx(1, abs=0.03)
    assert found.mean_completeness == pytest.approx(1, abs=0.03)
    assert all(error < 0.05 for error in found.informativeness.values())
    assert (found.importance.argmax(0).cpu() == torch.arange(3)).all()
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(3))).Q
    mixed = dci((plain @ rotation).to(device), factors, (test_plain @ rotation).to(device), test_factors)
    assert mixed.disentanglement < 0.5
    assert mixed.mean_completeness < 0.5
    assert all(error < 0.05 for error in mixed.informativeness.values())


def test_intervals_of_dci_end_at_1():
    generator = torch.Generator().manual_seed(4)
    known = {name: torch.rand(14, generator=generator) for name in "ab"}
    x = torch.stack([*known.values()], dim=1) + 0.02 * torch.randn(14, 2, generator=generator)
    found = dci(x, known, x, known).intervals
    for name in ("disentanglement", "mean_completeness"):
        assert found[name].low < found[name].value < found[name].high == 1


def test_the_unit_of_a_factor_does_not_matter():
    train, test = separate(world(400, 0)), separate(world(200, 1))
    mixed = torch.randn(7, 7, generator=torch.Generator().manual_seed(2))
    x, test_x = (code(world(n, seed)) @ mixed for n, seed in ((400, 0), (200, 1)))
    found = dci(x, train, test_x, test)
    for factors in (train, test):
        factors["scale"] = 360 * factors["scale"]
    degrees = dci(x, train, test_x, test)
    assert degrees.disentanglement == pytest.approx(found.disentanglement, abs=1e-3)
    assert degrees.informativeness == pytest.approx(found.informativeness, abs=1e-3)


def test_classes_and_useless_dimensions_are_counted_rightly(device):
    """Four dimensions of one class: disentangled, but not complete. Noise dimensions weigh nothing."""
    train, test = world(1500, 0), world(800, 1)
    factors, test_factors = separate(train), separate(test)
    noise = torch.randn(2300, 3, generator=torch.Generator().manual_seed(1))
    x, test_x = torch.cat((code(train), noise[:1500]), 1), torch.cat((code(test), noise[1500:]), 1)
    found = dci(x.to(device), factors, test_x.to(device), test_factors)
    assert found.disentanglement > 0.9
    assert found.completeness["class"] < 0.6
    assert found.completeness["scale"] > 0.9
    assert found.importance[7:].max() < 0.05 * found.importance.max()
    blind = dci(noise[:1500].to(device), factors, noise[1500:].to(device), test_factors)
    assert all(error == pytest.approx(1, abs=0.05) for error in blind.informativeness.values())


def test_scores_follow_their_definition():
    train, test = world(400, 0), world(200, 1)
    found = dci(code(train), separate(train), code(test), separate(test))
    importance = found.importance
    entropy = [-sum(p * np.log(p) / np.log(4) for p in (row / row.sum()).tolist() if p > 0) for row in importance]
    weights = importance.sum(1) / importance.sum()
    assert found.disentanglement == pytest.approx(
        sum(float(w) * (1 - e) for w, e in zip(weights, entropy, strict=True))
    )
    column = importance[:, 0] / importance[:, 0].sum()
    entropy = -sum(p * np.log(p) / np.log(7) for p in column.tolist() if p > 0)
    assert found.completeness["class"] == pytest.approx(1 - entropy)


def test_intervals_of_dci_leave_out_groups_of_training_samples(monkeypatch):
    """By scikit-learn's lasso without each of ten groups, at the penalties of the whole."""
    monkeypatch.setattr(module, "PENALTIES", (0.05,))
    train, test = world(203, 0), world(100, 1)
    factors, test_factors = ({n: separate(w)[n] for n in ("y", "x", "scale")} for w in (train, test))
    noise = torch.randn(303, 7, generator=torch.Generator().manual_seed(1))
    x, test_x = code(train) + noise[:203], code(test) + noise[203:]
    found = dci(x, factors, test_x, test_factors)
    z = ((x - x.mean(0)) / x.std(0, correction=0)).double().numpy()
    columns = [(values / values.std(correction=0)).double().numpy() for values in factors.values()]
    penalties = [0.05 * abs(z.T @ (y - y.mean()) / len(z)).max() for y in columns]

    def disentanglement(kept):
        fits = (Lasso(alpha=p, tol=1e-12).fit(z[kept], y[kept]) for p, y in zip(penalties, columns, strict=True))
        importance = np.stack([abs(one.coef_) for one in fits], axis=1)
        p = importance / importance.sum(1, keepdims=True).clip(1e-300)
        entropy = -(p * np.log(p.clip(1e-300))).sum(1) / np.log(3)
        return float((importance.sum(1) / importance.sum() * (1 - entropy)).sum())

    group_of = group_of_each(203, 10).numpy()
    parts = [disentanglement(group_of != group) for group in range(10)]
    half = 2.262 * (9 / 10 * sum((part - np.mean(parts)) ** 2 for part in parts)) ** 0.5
    interval = found.intervals["disentanglement"]
    assert interval.value == found.disentanglement == pytest.approx(disentanglement(np.arange(203) >= 0), abs=1e-6)
    assert interval.high - interval.value == pytest.approx(half, abs=1e-5)
    assert half > 0.01
    assert (interval.n, interval.method) == (203, "jackknife")
    assert found.intervals["mean_completeness"].value == found.mean_completeness
    error = found.intervals["mean_informativeness"]
    assert error.value == pytest.approx(sum(found.informativeness.values()) / 3)
    assert error.low < error.value < error.high
    assert (error.n, error.method) == (100, "bootstrap")


def test_what_has_no_dci_is_refused():
    x, factors = torch.zeros(10, 3), {"a": torch.arange(10.0), "b": torch.ones(10)}
    with pytest.raises(ValueError, match="two factors"):
        dci(x, {"a": factors["a"]}, x, factors)
    with pytest.raises(ValueError, match="does not vary"):
        dci(torch.eye(10), factors, torch.eye(10), factors)
    with pytest.raises(ValueError, match="groups=1"):
        dci(x, factors, x, factors, groups=1)
    with pytest.raises(ValueError, match="factor 'b'"):
        dci(torch.eye(10), factors, torch.eye(10), {"a": factors["a"]})


def test_a_bottleneck_is_as_wide_as_what_it_must_hold(device):
    """Five classes in four loud dimensions, noise in the others."""
    generator = torch.Generator().manual_seed(0)
    means = 6 * torch.nn.functional.pad(torch.linalg.qr(torch.randn(5, 5, generator=generator)).Q, (0, 11))
    labels = torch.randint(0, 5, (1500,), generator=generator)
    x = means[labels] + torch.randn(1500, 16, generator=generator) + 9
    scores = bottleneck_sweep(
        x[:800].to(device), labels[:800].to(device), x[800:].to(device), labels[800:].to(device), probe=ONE
    )
    assert [score.width for score in scores] == [2, 4, 8, 16]
    two, four, _, full = scores
    assert two.interval.value < 0.9 < four.interval.value
    assert four.interval.value > full.interval.value - 0.01
    assert full.variance == pytest.approx(1)
    assert [s.variance for s in scores] == sorted(s.variance for s in scores)
    assert four.interval.n == 700
    with pytest.raises(ValueError, match="widths"):
        bottleneck_sweep(x, labels, x, labels, widths=(17,))


def test_directions_without_variance_stay_silent(device):
    """Eight dimensions behind a map to 128: what float32 leaves in the other 120 must not count as features."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(600, 8, generator=generator)
    labels = (1.5 * hidden[:, 0] + hidden[:, 1] + 0.5 * torch.randn(600, generator=generator) > 0).long()
    x = (hidden @ torch.randn(8, 128, generator=generator) + 3).to(device)
    labels = labels.to(device)
    eight, full = bottleneck_sweep(x[:200], labels[:200], x[200:], labels[200:], widths=(8, 128), probe=ONE)
    assert full.interval.value == pytest.approx(eight.interval.value, abs=0.01)


@pytest.mark.parametrize("kind", [torch.bool, torch.uint8, torch.int32])
def test_classes_may_be_of_any_integer_type(device, kind):
    train, test = world(300, 0), world(200, 1)
    x, test_x = code(train).to(device), code(test).to(device)
    for part in (train, test):
        part["class"] = (part["class"] > 1).to(kind)
    (score,) = factor_probe(x, {"class": train["class"]}, test_x, {"class": test["class"]}, probe=ONE)
    assert score.interval.value == 1
    assert dci(x, separate(train), test_x, separate(test)).informativeness["class"] < 0.1


def test_unknown_classes_and_factors_of_several_columns_are_named():
    train, test = world(50, 0), world(40, 1)
    x, test_x, unknown = code(train), code(test), torch.full((40,), -1)
    with pytest.raises(ValueError, match="factor 'class'"):
        factor_probe(x, {"class": train["class"]}, test_x, {"class": unknown}, probe=ONE)
    with pytest.raises(ValueError, match="test_labels"):
        bottleneck_sweep(x, train["class"], test_x, unknown)
    with pytest.raises(ValueError, match="factor 'place'"):
        dci(x, train, test_x, test)


def test_a_factor_that_does_not_vary_has_no_score():
    factors, held_out = separate(world(60, 0)), separate(world(60, 1))
    x, test = code(world(60, 0)), code(world(60, 1))
    for known, test_known, samples in (
        ({**factors, "x": torch.full((60,), 0.1)}, held_out, "training"),
        (factors, {**held_out, "x": factors["x"].mean().expand(60)}, "test"),
    ):
        for probe in (factor_probe, dci):
            with pytest.raises(ValueError, match=f"factor 'x': it does not vary over the {samples} samples"):
                probe(x, known, test, test_known)
    for known, test_known, samples in (
        ({"class": torch.zeros(60).long()}, {"class": held_out["class"]}, "training"),
        ({"class": factors["class"]}, {"class": torch.ones(60).long()}, "test"),
    ):
        with pytest.raises(ValueError, match=f"factor 'class': it does not vary over the {samples} samples"):
            factor_probe(x, known, test, test_known)
    with pytest.raises(ValueError, match="factor 'x': NaN"):
        factor_probe(x, {**factors, "x": factors["x"] / 0}, test, held_out)
