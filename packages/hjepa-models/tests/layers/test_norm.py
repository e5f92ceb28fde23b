import pytest
import torch
from torch.nn import functional

from hjepa_models.layers.norm import GlobalBatchNorm


def pair(device):
    ours, theirs = GlobalBatchNorm(6).to(device), torch.nn.BatchNorm1d(6).to(device)
    ours.reset_parameters()
    return ours, theirs


def test_equals_batch_norm_in_training_and_gradient(device):
    ours, theirs = pair(device)
    base = torch.randn(16, 6, device=device) * 3 + 1
    results = []
    for norm in (ours, theirs):
        x = base.clone().requires_grad_()
        norm(x).pow(3).sum().backward()
        results.append((norm(base), x.grad))
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("shape", [(5, 6), (2, 6, 3, 2)])
def test_running_statistics_are_those_of_batch_norm(device, shape):
    ours, theirs = pair(device)
    for seed in range(3):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device) * 3 + 1
        ours(x)
        functional.batch_norm(x, theirs.running_mean, theirs.running_var, training=True, momentum=0.1)
    ours(x, track=False)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)


def test_running_statistics_are_used_in_evaluation(device):
    ours, _ = pair(device)
    for _ in range(200):
        ours(torch.randn(256, 6, device=device) * 3 + 5)
    ours.eval()
    out = ours(torch.full((1, 6), 5.0, device=device))
    assert out.abs().max() < 0.2
    before = ours.running_mean.clone()
    ours(torch.randn(4, 6, device=device))
    assert torch.equal(before, ours.running_mean)
