import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hjepa_models.objectives import ContrastScope, info_nce, patch_discrimination


def similarity(x, y, temperature):
    x, y = x.double(), y.double()
    return float(x @ y / (x.norm() * y.norm())) / temperature


def naive_patches(prediction, target, temperature, scope, weight):
    """The published formula by plain loops in float64."""
    images = []
    everyone = [(b, k) for b in range(len(target)) for k in range(target.shape[1]) if weight[b, k] > 0]
    for b in range(len(prediction)):
        total, known = 0.0, 0.0
        for k in range(prediction.shape[1]):
            if weight[b, k] == 0:
                continue
            candidates = [(i, j) for i, j in everyone if scope is ContrastScope.batch or i == b]
            others = [similarity(prediction[b, k], target[i, j], temperature) for i, j in candidates]
            own = similarity(prediction[b, k], target[b, k], temperature)
            total += float(weight[b, k]) * (math.log(sum(math.exp(s) for s in others)) - own)
            known += float(weight[b, k])
        images.append(total / known)
    return sum(images) / len(images)


@given(st.sampled_from(list(ContrastScope)), st.floats(0.05, 2.0), st.booleans(), st.integers(0, 99))
def test_patches_equal_a_naive_float64_loop(device, scope, temperature, weighted, seed):
    generator = torch.Generator().manual_seed(seed)
    prediction, target = torch.randn(2, 3, 5, 4, generator=generator)
    weight = torch.rand(3, 5, generator=generator) if weighted else torch.ones(3, 5)
    weight[:, 1:] *= (torch.rand(3, 4, generator=generator) < 0.6) if weighted else 1
    expected = naive_patches(prediction, target, temperature, scope, weight)
    given_weight = weight.to(device) if weighted else None
    result = patch_discrimination(prediction.to(device), target.to(device), temperature, scope, given_weight)
    assert float(result) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_a_blind_prediction_costs_the_logarithm_of_the_candidates_and_a_right_one_nothing(device):
    target = torch.eye(6, device=device).repeat(2, 1, 1)[:, :5]
    blind = torch.ones(2, 5, 6, device=device)
    assert float(patch_discrimination(blind, target)) == pytest.approx(math.log(5))
    assert float(patch_discrimination(blind, target, scope="batch")) == pytest.approx(math.log(10))
    assert float(patch_discrimination(target, target)) == pytest.approx(math.log1p(4 * math.exp(-10)), abs=1e-6)
    assert float(patch_discrimination(target.roll(1, 1), target)) > 9


def test_only_the_batch_scope_tells_images_apart(device):
    # Both images hold the same directions, so a token finds itself in its image, but not in the batch.
    target = torch.eye(4, device=device).repeat(2, 1, 1)
    inside, across = (float(patch_discrimination(target, target, 0.05, scope)) for scope in ContrastScope)
    assert inside == pytest.approx(0, abs=1e-6)
    assert across == pytest.approx(math.log(2), rel=1e-4)


@pytest.mark.parametrize("scope", list(ContrastScope))
def test_only_the_direction_counts(device, scope):
    prediction, target = torch.randn(2, 2, 5, 4, device=device)
    first = patch_discrimination(prediction, target, scope=scope)
    torch.testing.assert_close(patch_discrimination(3 * prediction, 0.1 * target, scope=scope), first)


@pytest.mark.parametrize("scope", list(ContrastScope))
def test_unknown_tokens_neither_ask_nor_answer(device, scope):
    prediction, target = torch.randn(2, 2, 5, 4, device=device)
    weight = torch.ones(2, 5, device=device)
    weight[:, 3:] = 0
    expected = patch_discrimination(prediction[:, :3], target[:, :3], scope=scope)
    torch.testing.assert_close(patch_discrimination(prediction, target, 0.1, scope, weight), expected)
    prediction = prediction.clone().requires_grad_()
    with torch.no_grad():
        prediction[:, 3:] = 0
    patch_discrimination(prediction, target, 0.1, scope, weight).backward()
    assert prediction.grad.isfinite().all()
    assert not prediction.grad[:, 3:].any()


def test_an_image_without_a_known_token_is_finite(device):
    tokens = torch.randn(1, 3, 4, device=device)
    for scope in ContrastScope:
        assert float(patch_discrimination(tokens, tokens, 0.1, scope, torch.zeros(1, 3, device=device))) == 0


def naive_info_nce(first, second, temperature):
    total = 0.0
    for i in range(len(first)):
        own = similarity(first[i], second[i], temperature)
        forth = sum(math.exp(similarity(first[i], row, temperature)) for row in second)
        back = sum(math.exp(similarity(second[i], row, temperature)) for row in first)
        total += math.log(forth) + math.log(back) - 2 * own
    return total / (2 * len(first))


@given(st.integers(2, 6), st.floats(0.05, 2.0), st.integers(0, 99))
def test_info_nce_equals_a_naive_float64_loop(device, rows, temperature, seed):
    first, second = torch.randn(2, rows, 4, generator=torch.Generator().manual_seed(seed))
    result = float(info_nce(first.to(device), second.to(device), temperature))
    assert result == pytest.approx(naive_info_nce(first, second, temperature), rel=1e-4, abs=1e-6)
    assert float(info_nce(second.to(device), first.to(device), temperature)) == pytest.approx(result, rel=1e-5)


def test_info_nce_of_one_point_is_the_logarithm_of_the_rows(device):
    rows = torch.ones(7, 3, device=device)
    assert float(info_nce(rows, rows)) == pytest.approx(math.log(7))


def test_contrast_repairs_a_collapse(device):
    z = (torch.ones(16, 4, device=device) + 0.05 * torch.randn(16, 4, device=device)).requires_grad_()
    optimizer = torch.optim.Adam([z], lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        info_nce(z, z, 0.5).backward()
        optimizer.step()
    unit = torch.nn.functional.normalize(z.detach(), dim=-1)
    assert unit.mean(0).norm() < 0.2


def test_bad_choices_are_refused():
    tokens = torch.randn(1, 2, 3)
    with pytest.raises(ValueError, match="scope='world': unknown choice; allowed: image, batch"):
        patch_discrimination(tokens, tokens, scope="world")
    with pytest.raises(ValueError, match=r"temperature=0\.0: must be above 0"):
        patch_discrimination(tokens, tokens, 0.0)
    with pytest.raises(ValueError, match="temperature=-1: must be above 0"):
        info_nce(tokens[0], tokens[0], -1)
