import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hjepa_models.objectives import (
    TwoHotConfig,
    symexp,
    symlog,
    symlog_bins,
    two_hot,
    two_hot_loss,
    two_hot_mean,
)


def naive_encoding(value, bins):
    """The published encoding of one value by plain Python."""
    x = math.copysign(math.log1p(abs(value)), value)
    x = min(max(x, bins[0]), bins[-1])
    row = [0.0] * len(bins)
    below = max(k for k in range(len(bins)) if bins[k] <= x)
    above = min(k for k in range(len(bins)) if bins[k] >= x)
    if below == above:
        row[below] = 1.0
        return row
    row[below] = (bins[above] - x) / (bins[above] - bins[below])
    row[above] = (x - bins[below]) / (bins[above] - bins[below])
    return row


def naive_loss(logits, target, bins, weight):
    """Cross entropy written out in float64: encoding, log-softmax, means."""
    images = []
    for b in range(len(target)):
        total, known = 0.0, 0.0
        for n in range(target.shape[1]):
            channels = []
            for d in range(target.shape[2]):
                z = logits[b, n, d].double().tolist()
                normaliser = math.log(sum(math.exp(value) for value in z))
                row = naive_encoding(float(target[b, n, d]), bins)
                channels.append(-sum(q * (value - normaliser) for q, value in zip(row, z, strict=True)))
            total += float(weight[b, n]) * sum(channels) / len(channels)
            known += float(weight[b, n])
        images.append(total / known)
    return sum(images) / len(images)


def test_bins_are_even_and_hold_zero(device):
    bins = symlog_bins(3.0, 41, device)
    assert bins.shape == (41,)
    assert bins[20] == 0
    assert torch.equal(bins, -bins.flip(0))
    torch.testing.assert_close(bins.diff(), torch.full((40,), 0.15, device=device))


@given(st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=6), st.integers(1, 20), st.floats(0.1, 10.0))
def test_encoding_equals_a_naive_one_and_its_mean_is_the_value(device, values, half, limit):
    bins = symlog_bins(limit, 2 * half + 1, device).double()
    x = torch.tensor(values, dtype=torch.float64, device=device)
    encoded = two_hot(x, bins)
    expected = torch.tensor([naive_encoding(value, bins.tolist()) for value in values], dtype=torch.float64)
    torch.testing.assert_close(encoded.cpu(), expected)
    torch.testing.assert_close(encoded.sum(-1), torch.ones_like(x))
    assert ((encoded > 0).sum(-1) <= 2).all()
    edge = symexp(bins[-1])
    torch.testing.assert_close(symexp(encoded @ bins), x.clamp(-edge, edge))


def test_values_on_a_bin_and_beyond_the_last_are_one_hot(device):
    bins = symlog_bins(2.0, 5, device)
    values = symexp(bins)
    torch.testing.assert_close(two_hot(values, bins), torch.eye(5, device=device), atol=1e-6, rtol=0)
    far = two_hot(torch.tensor([-1e9, 1e9], device=device), bins)
    assert torch.equal(far, torch.eye(5, device=device)[[0, 4]])


def test_the_mean_of_the_log_encoding_is_the_value(device):
    bins = symlog_bins(3.0, 41, device)
    values = torch.tensor([[-7.5, 0.0, 0.3], [19.0, -1e-3, 2.0]], device=device)
    logits = two_hot(values, bins).clamp(min=1e-30).log()
    torch.testing.assert_close(two_hot_mean(logits, bins), values, atol=1e-4, rtol=1e-4)


def test_equal_logits_mean_exactly_zero(device):
    bins = symlog_bins(3.0, 41, device)
    assert torch.equal(two_hot_mean(torch.full((7, 41), 1.7, device=device), bins), torch.zeros(7, device=device))


@given(st.integers(0, 99))
def test_loss_equals_a_naive_float64_loop(device, seed):
    generator = torch.Generator().manual_seed(seed)
    bins = symlog_bins(2.0, 9)
    logits = 2 * torch.randn(2, 3, 4, 9, generator=generator)
    target = 5 * torch.randn(2, 3, 4, generator=generator)
    weight = torch.rand(2, 3, generator=generator) + 0.01
    expected = naive_loss(logits, target, bins.tolist(), weight)
    result = two_hot_loss(*(t.to(device) for t in (logits, target, bins, weight)))
    assert float(result) == pytest.approx(expected, rel=1e-4)


def test_loss_is_the_cross_entropy_with_the_encoding(device):
    bins = symlog_bins(2.0, 9, device)
    logits, target = torch.randn(2, 3, 4, 9, device=device), 3 * torch.randn(2, 3, 4, device=device)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 2), two_hot(target, bins).flatten(0, 2))
    torch.testing.assert_close(two_hot_loss(logits, target, bins), expected)


def test_equal_logits_cost_the_logarithm_of_the_bins_and_a_sure_right_answer_nothing(device):
    bins = symlog_bins(2.0, 9, device)
    target = symexp(bins[torch.tensor([[[0, 4, 8]]], device=device)])
    assert float(two_hot_loss(torch.zeros(1, 1, 3, 9, device=device), target, bins)) == pytest.approx(math.log(9))
    sure = 50 * two_hot(target, bins)
    assert float(two_hot_loss(sure, target, bins)) == pytest.approx(0, abs=1e-3)


def test_unknown_tokens_do_not_count(device):
    bins = symlog_bins(2.0, 9, device)
    logits, target = torch.randn(1, 2, 3, 9, device=device), torch.randn(1, 2, 3, device=device)
    weight = torch.tensor([[1.0, 0.0]], device=device)
    torch.testing.assert_close(
        two_hot_loss(logits, target, bins, weight), two_hot_loss(logits[:, :1], target[:, :1], bins)
    )


def test_a_head_learns_a_target_that_a_mean_would_blur(device):
    # Two values, far apart, from the same token: the bins hold both, the mean lies between them.
    config = TwoHotConfig(num_bins=21, limit=3.0)
    head = config.build(2, seed=1, device=device)
    tokens = torch.ones(2, 1, 2, device=device)
    target = torch.tensor([[[5.0, 0.0]], [[-5.0, 0.0]]], device=device)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.1)
    for _ in range(80):
        optimizer.zero_grad()
        head.loss(head(tokens), target).backward()
        optimizer.step()
    logits = head(tokens).detach()
    probability = logits[0, 0, 0].softmax(-1)
    bins = symlog_bins(3.0, 21, device)
    near = (bins.abs() - symlog(torch.tensor(5.0, device=device))).abs() < 0.3
    assert float(probability[near].sum()) > 0.95
    assert head.mean(logits)[0, 0].tolist() == pytest.approx([0.0, 0.0], abs=0.05)


def test_a_new_head_predicts_about_zero_and_is_a_function_of_its_seed(device):
    config = TwoHotConfig()
    head, same, other = (config.build(16, seed=seed, device=device) for seed in (3, 3, 4))
    tokens = torch.randn(2, 5, 16, device=device)
    logits = head(tokens)
    assert logits.shape == (2, 5, 16, 41)
    assert head.mean(logits).abs().max() < 0.05
    assert torch.equal(logits, same(tokens))
    assert not torch.equal(logits, other(tokens))
    assert set(head.state_dict()) == {"proj.weight", "proj.bias"}
    assert config.build(16, device="meta").proj.weight.is_meta


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TwoHotConfig(num_bins=40), "num_bins=40: 0 would not be a bin; allowed: odd"),
        (lambda: TwoHotConfig(num_bins=1), "use e.g. 3"),
        (lambda: TwoHotConfig(limit=0.0), "limit=0.0: bins without width"),
        (lambda: symlog_bins(1.0, 4), "count=4: 0 would not be a bin"),
    ],
)
def test_bad_bins(build, message):
    with pytest.raises(ValueError, match=message):
        build()
