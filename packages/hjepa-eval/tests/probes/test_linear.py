import math

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F

from hjepa_eval import (
    AttentiveProbe,
    HeadTraining,
    LinearProbe,
    LogisticProbe,
    SegmentationProbe,
    knn_predict,
)
from hjepa_eval.probes.heads import learning_rate_factor

TRAINING = HeadTraining(learning_rates=(1e-2, 1e-1), weight_decays=(0.0, 1e-3), epochs=15, batch_size=256)


def classes(n, width, seed, noise=4.0):
    means = torch.randn(5, width, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 5, (n,), generator=generator)
    return means[labels] + noise * torch.randn(n, width, generator=generator), labels


def test_near_scikit_learn_and_the_telling_features_are_chosen(device):
    (x, y), (test_x, test_y) = classes(3000, 24, 1), classes(20_000, 24, 2)
    stream = torch.Generator().manual_seed(0)
    sets = {"noise": torch.randn(3000, 40, generator=stream), "told": x * 10 + 3, "half": x[:, :8]}
    test_sets = {"noise": torch.randn(20_000, 40, generator=stream), "told": test_x * 10 + 3, "half": test_x[:, :8]}
    probe = LinearProbe(TRAINING).fit({k: v.to(device) for k, v in sets.items()}, y.to(device))
    assert probe.chosen.features == "told"
    assert len(probe.candidates) == 12
    assert probe.chosen.held_out == max(one.held_out for one in probe.candidates)
    ours = probe.accuracy({"told": test_sets["told"].to(device)}, test_y.to(device))
    theirs = LogisticRegression(C=1.0, max_iter=1000).fit(((x - x.mean(0)) / x.std(0)).numpy(), y.numpy())
    expected = theirs.score(((test_x - x.mean(0)) / x.std(0)).numpy(), test_y.numpy())
    assert 0.4 < expected < 0.9
    assert ours == pytest.approx(expected, abs=0.003)


def test_as_it_comes_it_is_within_three_tenths_of_a_point_of_scikit_learn(device):
    """On few samples, where large batches would make few steps, and on enough test samples to tell."""
    (x, y), (test_x, test_y) = classes(3000, 24, 11), classes(20_000, 24, 21)
    ours = LinearProbe().fit({"x": x.to(device)}, y.to(device)).accuracy({"x": test_x.to(device)}, test_y.to(device))
    theirs = LogisticRegression(C=1.0, max_iter=1000).fit(((x - x.mean(0)) / x.std(0)).numpy(), y.numpy())
    expected = theirs.score(((test_x - x.mean(0)) / x.std(0)).numpy(), test_y.numpy())
    assert ours == pytest.approx(expected, abs=0.003)


def test_heads_trained_at_once_equal_heads_trained_alone(device):
    """Neither another learning rate, nor another decay, nor wider features beside it, nor one that diverges matters."""
    x, y = classes(400, 6, 3)
    wide = torch.cat((x, torch.randn(400, 5, generator=torch.Generator().manual_seed(1))), dim=1)
    config = {"epochs": 3, "batch_size": 64, "refit": False}
    many = LinearProbe(HeadTraining(learning_rates=(0.05, 1e18), weight_decays=(0.0, 0.1), **config))
    many.fit({"x": x.to(device), "wide": wide.to(device)}, y.to(device))
    alone = {}
    for one in many.candidates:
        if one.learning_rate < 1:
            single = HeadTraining(learning_rates=(one.learning_rate,), weight_decays=(one.weight_decay,), **config)
            probe = LinearProbe(single).fit(
                {one.features: {"x": x, "wide": wide}[one.features].to(device)}, y.to(device)
            )
            alone[one.features, one.weight_decay] = probe
            assert one.held_out == pytest.approx(probe.chosen.held_out)
    best = alone[many.chosen.features, many.chosen.weight_decay]
    torch.testing.assert_close(many._head.weight, best._head.weight, rtol=1e-4, atol=1e-6)
    assert many._head.weight.shape[1] == {"x": 6, "wide": 11}[many.chosen.features]


@pytest.mark.parametrize("refit", [False, True])
def test_a_step_is_that_of_sgd_with_momentum_by_hand(device, refit):
    """Of the samples that are not held out, and of all where the chosen head is trained again."""
    x, y = classes(10, 3, 4)
    config = HeadTraining(
        learning_rates=(0.3,), weight_decays=(0.01,), epochs=2, batch_size=10 if refit else 8, held_out=0.2, refit=refit
    )
    probe = LinearProbe(config).fit({"x": x.to(device)}, y.to(device), 5)
    z = ((x - x.mean(0)) / x.std(0, correction=0)).double()
    kept = torch.randperm(10, generator=torch.Generator().manual_seed(0))[0 if refit else 2 :]
    weight, velocity = torch.zeros(5, 3, dtype=torch.float64), torch.zeros(5, 3, dtype=torch.float64)
    bias, bias_velocity = torch.zeros(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    for step in range(2):
        error = torch.softmax(z[kept] @ weight.T + bias, 1) - F.one_hot(y[kept], 5)
        rate = 0.3 * 0.5 * (1 + math.cos(math.pi * step / 2))
        velocity = 0.9 * velocity + error.T @ z[kept] / len(kept) + 0.01 * weight
        bias_velocity = 0.9 * bias_velocity + error.mean(0) + 0.01 * bias
        weight, bias = weight - rate * velocity, bias - rate * bias_velocity
    torch.testing.assert_close(probe._head.weight.detach().cpu().double(), weight, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(probe._head.bias.detach().cpu().double(), bias, rtol=1e-4, atol=1e-6)


def test_the_choice_is_made_on_training_samples_only(device):
    """With labels of pure noise, the chosen head's held-out accuracy is an optimist; the test accuracy is not."""
    generator = torch.Generator().manual_seed(5)
    x, y = torch.randn(300, 20, generator=generator), torch.randint(0, 2, (300,), generator=generator)
    test_x, test_y = torch.randn(4000, 20, generator=generator), torch.randint(0, 2, (4000,), generator=generator)
    probe = LinearProbe(TRAINING).fit({"x": x.to(device)}, y.to(device))
    assert probe.accuracy({"x": test_x.to(device)}, test_y.to(device)) == pytest.approx(0.5, abs=0.03)


def test_the_global_generator_is_left_alone(device):
    x, y = classes(50, 4, 6)
    state = torch.get_rng_state()
    first, again = (LinearProbe(TRAINING).fit({"x": x.to(device)}, y.to(device)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert first.candidates == again.candidates


def test_learning_rates_rise_and_fall():
    factors = [learning_rate_factor(step, 100, 0.1) for step in range(100)]
    assert factors[:10] == sorted(factors[:10])
    assert factors[10] == 1
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert 0 < factors[99] < 0.01


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rates": ()}, "learning_rates"),
        ({"weight_decays": (-1.0,)}, "weight_decays"),
        ({"epochs": 0}, "epochs"),
        ({"warmup": 1.0}, "warmup"),
        ({"held_out": 0.0}, "held_out"),
        ({"optimizer": "lbfgs"}, "optimizer=lbfgs: unknown; allowed: sgd, adamw"),
    ],
)
def test_config_refuses_what_makes_no_sense(change, message):
    with pytest.raises(ValueError, match=message) as raised:
        HeadTraining(**change)
    assert "\n" not in str(raised.value)


def test_wrong_data_and_order_of_calls_are_refused():
    with pytest.raises(RuntimeError, match="fit"):
        LinearProbe().predict({"x": torch.zeros(1, 2)})
    with pytest.raises(ValueError, match="none"):
        LinearProbe().fit({}, torch.arange(2))
    with pytest.raises(ValueError, match="one label a row"):
        LinearProbe().fit({"x": torch.zeros(3, 2)}, torch.arange(2))
    with pytest.raises(ValueError, match="unknown"):
        LinearProbe().fit({"x": torch.zeros(2, 2)}, torch.tensor([0, -1]))
    with pytest.raises(ValueError, match="reads 'x'"):
        LinearProbe(HeadTraining(epochs=1)).fit({"x": torch.eye(4)}, torch.arange(4)).predict({"y": torch.eye(4)})
    with pytest.raises(ValueError, match="diverge"):
        LinearProbe(HeadTraining(learning_rates=(1e38,), weight_decays=(1.0,), epochs=5)).fit(
            {"x": torch.randn(20, 2, generator=torch.Generator().manual_seed(0))}, torch.arange(20) % 2
        )


def test_a_second_fit_forgets_the_first(device):
    """The heads of the first fit, on labels that are told, must not be chosen among for the second."""
    (x, y), config = classes(200, 6, 7), HeadTraining(learning_rates=(1e-4, 1e-1), weight_decays=(0.0,), epochs=10)
    x, y = x.to(device), y.to(device)
    noise = torch.randint(0, 5, (200,), generator=torch.Generator().manual_seed(1)).to(device)
    again = LinearProbe(config).fit({"x": x}, y).fit({"x": x}, noise)
    fresh = LinearProbe(config).fit({"x": x}, noise)
    assert again.candidates == fresh.candidates
    assert again.chosen == fresh.chosen


def test_autocast_around_changes_nothing(device):
    x, y = classes(200, 6, 8)
    x, y = x.to(device), y.to(device)
    plain = LinearProbe(TRAINING).fit({"x": x}, y)
    with torch.autocast(device.type, torch.bfloat16):
        inside = LinearProbe(TRAINING).fit({"x": x}, y)
        predicted = inside.predict({"x": x})
    assert torch.equal(inside._head.weight, plain._head.weight)
    assert torch.equal(predicted, plain.predict({"x": x}))


@pytest.mark.parametrize("probe", ["knn", "logistic", "linear", "attentive", "segmentation"])
def test_labels_beyond_the_number_of_classes_are_refused(probe):
    x, y = classes(60, 4, 9)
    fits = {
        "knn": lambda: knn_predict(x, y, x, ks=(3,), num_classes=4),
        "logistic": lambda: LogisticProbe().fit(x, y, 4),
        "linear": lambda: LinearProbe(TRAINING).fit({"x": x}, y, 4),
        "attentive": lambda: AttentiveProbe().fit(x[:, None], y, 4),
        "segmentation": lambda: SegmentationProbe().fit(x.view(15, 4, 4), y.view(15, 2, 2), (2, 2), 4),
    }
    with pytest.raises(ValueError, match="num_classes=4: labels go up to 4; allowed: 5 and more"):
        fits[probe]()


@pytest.mark.parametrize("kind", [torch.int32, torch.uint8, torch.bool])
def test_classes_may_be_of_any_integer_type(device, kind):
    x, y = classes(60, 4, 9)
    x, y = x.to(device), (y % 2).to(device)
    short = HeadTraining(learning_rates=(0.1,), weight_decays=(0.0,), epochs=2)
    expected = LinearProbe(short).fit({"x": x}, y).predict({"x": x})
    assert torch.equal(LinearProbe(short).fit({"x": x}, y.to(kind)).predict({"x": x}), expected)
