import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hjepa_models.objectives import DISTANCES, Objective, mean_token, prediction_loss, smooth_l1, symlog, weighted_mean


def naive(objective, prediction, target, weight, beta):
    """The losses by plain loops in float64."""
    images = []
    for b in range(len(prediction)):
        total, known = 0.0, 0.0
        for n in range(prediction.shape[1]):
            p, t = prediction[b, n].double(), target[b, n].double()
            e = (p - t).abs()
            distance = {
                Objective.smooth_l1: torch.where(e < beta, e**2 / (2 * beta), e - beta / 2).mean(),
                Objective.l1: e.mean(),
                Objective.l2: (e**2).mean(),
                Objective.cosine: 1 - (p @ t) / (p.norm() * t.norm()),
            }[objective]
            total += float(weight[b, n] * distance)
            known += float(weight[b, n])
        images.append(total / known)
    return sum(images) / len(images)


@given(st.sampled_from(list(DISTANCES)), st.floats(0.1, 3.0), st.booleans(), st.integers(0, 99))
def test_equals_a_naive_float64_loop(device, objective, beta, log, seed):
    generator = torch.Generator().manual_seed(seed)
    prediction, target = (2 * torch.randn(2, 5, 4, generator=generator) for _ in range(2))
    weight = torch.rand(2, 5, generator=generator)
    sides = [x.double().sign() * x.double().abs().log1p() if log else x for x in (prediction, target)]
    expected = naive(objective, *sides, weight, beta)
    result = prediction_loss(objective, prediction.to(device), target.to(device), weight.to(device), beta, symlog=log)
    assert float(result) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("objective", list(DISTANCES))
def test_equal_tokens_give_zero_and_unknown_ones_nothing(device, objective):
    target = torch.randn(2, 5, 8, device=device)
    weight = torch.ones(2, 5, device=device)
    weight[:, 3] = 0
    prediction = target.clone()
    prediction[:, 3] += 100
    assert float(prediction_loss(objective, prediction, target, weight, 1.0)) == pytest.approx(0, abs=1e-6)


def test_every_image_counts_the_same(device):
    distance = torch.tensor([[1.0, 1.0], [3.0, 9.0]], device=device)
    weight = torch.tensor([[1.0, 1.0], [0.5, 0.0]], device=device)
    assert float(weighted_mean(distance, weight)) == 2.0
    halves = [float(weighted_mean(distance[i : i + 1], weight[i : i + 1])) for i in range(2)]
    assert sum(halves) / 2 == 2.0


def test_an_image_without_a_known_token_is_finite(device):
    assert float(weighted_mean(torch.ones(1, 3, device=device), torch.zeros(1, 3, device=device))) == 0


def test_half_precision_is_compared_in_float32(device):
    tokens = torch.randn(1, 4, 8, device=device, dtype=torch.bfloat16)
    assert smooth_l1(tokens, tokens).dtype == torch.float32


def test_symlog_works_on_half_precision_in_float32(device):
    prediction, target = 30 * torch.randn(2, 1, 4, 8, device=device)
    expected = smooth_l1(symlog(prediction.bfloat16().float()), symlog(target.bfloat16().float()))
    halves = prediction.bfloat16(), target.bfloat16()
    torch.testing.assert_close(prediction_loss(Objective.smooth_l1, *halves, None, 1.0, symlog=True), expected)


@pytest.mark.parametrize("objective", sorted(set(Objective) - set(DISTANCES)))
def test_what_is_no_distance_is_refused(objective):
    with pytest.raises(ValueError, match=f"objective={objective}: no distance between tokens; allowed: smooth_l1, l1"):
        prediction_loss(objective, torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), None, 1.0)


def test_the_mean_token_is_that_of_the_known_ones(device):
    tokens = torch.arange(12.0, device=device).view(2, 3, 2)
    weight = torch.tensor([[1.0, 0.0, 3.0], [0.0, 0.0, 0.0]], device=device)
    assert mean_token(tokens, weight).tolist() == [[3.0, 4.0], [0.0, 0.0]]
    torch.testing.assert_close(mean_token(tokens), tokens.mean(1))
    assert mean_token(tokens.bfloat16(), weight).dtype == torch.float32
