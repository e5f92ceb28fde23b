import pytest
import torch

from hjepa_models.objectives import DISTANCES, Objective, cjepa_loss, prediction_loss, vicreg_terms


def naive(prediction, target, weight, scale, invariance, variance, covariance):
    """The sum written out in float64, the distance being the mean squared difference."""
    prediction, target, weight = prediction.double(), target.double(), weight.double()
    images, predicted, wanted = [], [], []
    for b in range(len(prediction)):
        share = [float(w / weight[b].sum()) for w in weight[b]]
        errors = (prediction[b] - target[b]).square().mean(-1)
        images.append(sum(s * float(error) for s, error in zip(share, errors, strict=True)))
        predicted.append(sum(s * p for s, p in zip(share, prediction[b], strict=True)))
        wanted.append(sum(s * t for s, t in zip(share, target[b], strict=True)))
    predicted, wanted = torch.stack(predicted), torch.stack(wanted)
    cov = torch.cov(predicted.T)
    width = len(cov)
    v = sum(max(0.0, 1 - (float(cov[j, j]) + 1e-4) ** 0.5) for j in range(width)) / width
    c = sum(float(cov[i, j]) ** 2 for i in range(width) for j in range(width) if i != j) / width
    s = float((predicted - wanted).square().mean())
    return sum(images) / len(images) + scale * (invariance * s + variance * v + covariance * c)


@pytest.mark.parametrize("weights", [(0.001, 25.0, 25.0, 1.0), (0.5, 0.0, 3.0, 2.0)])
def test_equals_a_naive_float64_loop(device, weights):
    prediction, target = 0.5 * torch.randn(2, 6, 5, 4)
    weight = torch.rand(6, 5)
    expected = naive(prediction, target, weight, *weights)
    names = ("vicreg_weight", "invariance", "variance", "covariance")
    fields = dict(zip(names, weights, strict=True))
    result = cjepa_loss(*(t.to(device) for t in (prediction, target, weight)), **fields)
    assert float(result) == pytest.approx(expected, rel=1e-4)


def test_the_defaults_are_the_published_weights(device):
    prediction, target = torch.randn(2, 6, 5, 4, device=device)
    distance = prediction_loss(Objective.l2, prediction, target, None, 1.0)
    terms = vicreg_terms(prediction.mean(1))
    invariance = (prediction.mean(1) - target.mean(1)).square().mean()
    expected = distance + 0.001 * (25 * invariance + 25 * terms.variance + terms.covariance)
    torch.testing.assert_close(cjepa_loss(prediction, target), expected)


def test_a_collapse_that_the_distance_rewards_is_seen(device):
    # Constant tokens on both sides: the distance is 0, the variance term is not.
    tokens = torch.ones(6, 5, 4, device=device)
    assert float(prediction_loss(Objective.l2, tokens, tokens, None, 1.0)) == 0
    assert float(cjepa_loss(tokens, tokens)) == pytest.approx(0.001 * 25 * 0.99)


def test_any_distance_may_stand_before_it(device):
    prediction, target = torch.randn(2, 6, 5, 4, device=device)
    for objective in DISTANCES:
        alone = prediction_loss(objective, prediction, target, None, 0.5)
        torch.testing.assert_close(cjepa_loss(prediction, target, None, objective, 0.5, vicreg_weight=0.0), alone)
