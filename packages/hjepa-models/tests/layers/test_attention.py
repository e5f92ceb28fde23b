import math

import pytest
import torch

from hjepa_models.layers.attention import Attention, AttentionBackend, explicit_attention
from hjepa_models.layers.positions import GridPositions, Position


def test_explicit_attention_equals_a_loop_in_float64(device):
    query, key, value = torch.randn(3, 1, 2, 4, 6, device=device)
    result = explicit_attention(query, key, value)
    for h in range(2):
        for i in range(4):
            scores = [math.exp(float(query[0, h, i].double() @ key[0, h, j].double()) / math.sqrt(6)) for j in range(4)]
            expected = sum(s * value[0, h, j].double() for j, s in enumerate(scores)) / sum(scores)
            torch.testing.assert_close(result[0, h, i].double(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("position", list(Position))
def test_backends_agree_in_value_and_gradient(device, qk_norm, position):
    layers = [Attention(24, 2, qk_norm=qk_norm, backend=backend).to(device) for backend in AttentionBackend]
    layers[1].load_state_dict(layers[0].state_dict())
    rotation = GridPositions(position, 24, 2, 100.0, (3, 4)).rotation((3, 4), None, device)
    results = []
    for layer in layers:
        x = torch.linspace(-2, 2, 2 * 12 * 24, device=device).sin().view(2, 12, 24).requires_grad_()
        out = layer(x, rotation)
        out.square().sum().backward()
        results.append((out, x.grad))
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-4)


def test_normalised_queries_bound_the_logits(device):
    layer = Attention(32, 2, qk_norm=True, backend=AttentionBackend.explicit).to(device)
    x = torch.randn(2, 5, 32, device=device)
    small, large = layer(x), layer(1000 * x)
    assert (large / 1000 - small).abs().max() < 0.5  # the mixing barely changes, the values scale
