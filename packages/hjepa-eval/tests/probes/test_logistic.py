import time

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from hjepa_eval import LogisticProbe, LogisticProbeConfig, fit_logistic


def mixture(n, width, seed, classes=10, noise=3.0):
    """Correlated features with a spectrum over two decades, classes that overlap."""
    fixed = torch.Generator().manual_seed(99)
    inner = width // 4
    means = torch.randn(classes, inner, generator=fixed)
    mix = torch.randn(3 * inner, width, generator=fixed) * torch.logspace(0, -2, 3 * inner)[:, None]
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (n,), generator=generator)
    hidden = torch.cat(
        (
            means[labels] + noise * torch.randn(n, inner, generator=generator),
            torch.randn(n, 2 * inner, generator=generator),
        ),
        dim=1,
    )
    return (hidden @ mix).tanh() + 0.02 * torch.randn(n, width, generator=generator) + 3.0, labels


def standardised(train, test):
    mean, scale = train.mean(0), train.std(0, correction=0)
    return ((train - mean) / scale).numpy(), ((test - mean) / scale).numpy()


@pytest.mark.parametrize("width", [32, 300])
def test_within_three_tenths_of_a_point_of_scikit_learn(device, width):
    (x, y), (test_x, test_y) = mixture(4000, width, 1), mixture(5000, width, 2)
    a, b = standardised(x, test_x)
    for l2 in (1e-2, 1e-3):
        probe = LogisticProbe(LogisticProbeConfig(l2=(l2,))).fit(x.to(device), y.to(device))
        theirs = LogisticRegression(C=1 / (len(x) * l2), max_iter=3000, tol=1e-6).fit(a, y.numpy())
        ours = probe.accuracy(test_x.to(device), test_y.to(device))
        assert ours == pytest.approx(theirs.score(b, test_y.numpy()), abs=0.003)
        assert 0.2 < ours < 0.99
        same = (theirs.predict(b) == probe.predict(test_x.to(device)).cpu().numpy()).mean()
        assert same > 0.99


def test_solution_has_the_gradient_of_a_minimum(device):
    x, y = mixture(1000, 16, 3, classes=4)
    x = ((x - x.mean(0)) / x.std(0)).to(device)
    y = y.to(device)
    ((weight, bias),) = fit_logistic(x, y, 4, [1e-2], tolerance=1e-6)
    weight, bias = weight.double().requires_grad_(), bias.double().requires_grad_()
    loss = torch.nn.functional.cross_entropy(x.double() @ weight.T + bias, y) + 0.005 * weight.square().sum()
    loss.backward()
    assert weight.grad.abs().max() < 1e-4
    assert bias.grad.abs().max() < 1e-4


def penalised(weight, bias, x, y, l2):
    weight, bias = (torch.as_tensor(part).cpu().double() for part in (weight, bias))
    return float(torch.nn.functional.cross_entropy(x.double() @ weight.T + bias, y) + l2 / 2 * weight.square().sum())


@pytest.mark.parametrize(("n", "width"), [(300, 400), (200, 500)])
def test_weak_penalties_on_more_dimensions_than_samples_reach_the_minimum(device, n, width):
    """Classes are separable there: the loss at the minimum is about the penalty, far below 1."""
    (x, y), (test_x, test_y) = mixture(n, width, 1), mixture(3000, width, 2)
    a, b = (torch.from_numpy(part) for part in standardised(x, test_x))
    penalties = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
    path = fit_logistic(a.to(device), y.to(device), 10, penalties)
    for l2, (weight, bias) in list(zip(penalties, path, strict=True))[-2:]:
        theirs = LogisticRegression(C=1 / (n * l2), max_iter=5000, tol=1e-8).fit(a.double().numpy(), y.numpy())
        least = penalised(theirs.coef_, theirs.intercept_, a, y, l2)
        assert penalised(weight, bias, a, y, l2) < 1.05 * least
        ours = ((b @ weight.cpu().T + bias.cpu()).argmax(1) == test_y).float().mean()
        assert float(ours) == pytest.approx(theirs.score(b.double().numpy(), test_y.numpy()), abs=0.003)


def test_a_single_class_is_fitted_though_nothing_is_lost(device):
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)).to(device)
    probe = LogisticProbe().fit(x, torch.zeros(50, dtype=torch.long, device=device))
    assert not probe.predict(x).any()
    assert probe.weight.isfinite().all()


def test_the_penalty_is_chosen_on_held_out_training_samples(device):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (300,), generator=generator)
    noise = torch.randn(300, 200, generator=generator)
    noise[:, 0] += 2.0 * (2 * labels - 1)
    probe = LogisticProbe(LogisticProbeConfig(l2=(1e-6, 1e-1, 1.0))).fit(noise.to(device), labels.to(device))
    assert set(probe.held_out_accuracy) == {1e-6, 1e-1, 1.0}
    assert probe.held_out_accuracy[probe.l2] == max(probe.held_out_accuracy.values())
    # 200 dimensions of noise for 300 samples: the weak penalty learns them by heart.
    assert probe.l2 > 1e-6


def test_the_search_ends_where_two_weaker_penalties_in_a_row_are_worse(device):
    (x, y), (held_x, _) = mixture(600, 64, 1), mixture(600, 64, 2)
    probe = LogisticProbe().fit(x.to(device), y.to(device))
    *_, best, worse, still_worse = probe.held_out_accuracy.values()
    assert best == max(probe.held_out_accuracy.values()) > worse
    assert best > still_worse
    assert min(probe.held_out_accuracy) > min(probe.config.l2)
    # What is fitted then, from where the search came to, is the one minimum that there is.
    a, _ = (torch.from_numpy(part) for part in standardised(x, held_x))
    ((weight, bias),) = fit_logistic(a.to(device), y.to(device), 10, [probe.l2])
    least = penalised(weight, bias, a, y, probe.l2)
    assert penalised(probe.weight, probe.bias, a, y, probe.l2) == pytest.approx(least, rel=1e-6)


def test_a_function_of_the_seed(device):
    x, y = mixture(500, 16, 4, classes=3)
    x, y = x.to(device), y.to(device)
    first, again, other = (LogisticProbe(LogisticProbeConfig(seed=seed)).fit(x, y) for seed in (1, 1, 2))
    assert torch.equal(first.weight, again.weight)
    assert first.held_out_accuracy == again.held_out_accuracy
    assert first.held_out_accuracy != other.held_out_accuracy


def test_scale_offset_and_constant_dimensions_do_not_matter(device):
    x, y = mixture(800, 16, 5, classes=3)
    stretched = torch.cat((x * 1000 - 7, torch.full((800, 1), 5.0)), dim=1)
    config = LogisticProbeConfig(l2=(1e-2,))
    plain = LogisticProbe(config).fit(x.to(device), y.to(device)).predict(x.to(device))
    moved = LogisticProbe(config).fit(stretched.to(device), y.to(device)).predict(stretched.to(device))
    assert (plain == moved).float().mean() > 0.995


def test_classes_that_the_test_alone_has_are_errors(device):
    x = torch.eye(4, device=device).repeat(5, 1)
    y = torch.arange(4, device=device).repeat(5)
    probe = LogisticProbe(LogisticProbeConfig(l2=(1e-3,))).fit(x, y)
    assert probe.accuracy(x[:4], torch.tensor([0, 1, 2, 9], device=device)) == pytest.approx(0.75)


@pytest.mark.slow
def test_twenty_thousand_samples_take_seconds(device):
    x, y = mixture(20_000, 96, 6)
    x, y = x.to(device), y.to(device)
    start = time.process_time()
    LogisticProbe().fit(x, y)
    assert time.process_time() - start < 10.0  # 1.2 s on one core of a server; the bound leaves room for slow ones


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"l2": ()}, "l2"),
        ({"l2": (0.0,)}, "l2"),
        ({"held_out": 1.0}, "held_out"),
        ({"max_iterations": 0}, "max_iterations"),
        ({"tolerance": 0.0}, "tolerance"),
    ],
)
def test_config_refuses_what_makes_no_sense(change, message):
    with pytest.raises(ValueError, match=message) as raised:
        LogisticProbeConfig(**change)
    assert "\n" not in str(raised.value)


def test_wrong_data_and_order_of_calls_are_refused():
    with pytest.raises(ValueError, match="unknown"):
        LogisticProbe().fit(torch.zeros(3, 2), torch.tensor([0, 1, -1]))
    with pytest.raises(ValueError, match="one label a row"):
        LogisticProbe().fit(torch.zeros(3, 2), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="at least two"):
        LogisticProbe().fit(torch.zeros(1, 2), torch.tensor([0]))
    with pytest.raises(RuntimeError, match="fit"):
        LogisticProbe().predict(torch.zeros(3, 2))


def test_two_samples_are_enough_to_fit(device):
    probe = LogisticProbe().fit(torch.eye(2, device=device), torch.arange(2, device=device))
    assert np.isfinite(probe.weight.cpu().numpy()).all()


def test_autocast_around_changes_nothing(device):
    x, y = mixture(2000, 32, 7)
    x, y = x.to(device), y.to(device)
    plain = LogisticProbe().fit(x, y)
    with torch.autocast(device.type, torch.bfloat16):
        inside = LogisticProbe().fit(x, y)
        predicted = inside.predict(x)
    assert inside.held_out_accuracy == plain.held_out_accuracy
    assert torch.equal(inside.weight, plain.weight)
    assert torch.equal(predicted, plain.predict(x))


def test_features_that_are_not_finite_or_of_another_width_are_named(device):
    x, y = mixture(60, 8, 8, classes=3)
    for value in (float("nan"), float("inf")):
        broken = x.clone()
        broken[5, 2] = value
        with pytest.raises(ValueError, match="NaN or infinity"):
            LogisticProbe().fit(broken.to(device), y.to(device))
    probe = LogisticProbe(LogisticProbeConfig(l2=(1e-2,))).fit(x.to(device), y.to(device))
    with pytest.raises(ValueError, match="width of 8"):
        probe.predict(x[:, :3].to(device))
    with pytest.raises(ValueError, match="unknown"):
        probe.accuracy(x.to(device), torch.full_like(y, -1).to(device))
