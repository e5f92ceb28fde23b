"""Attention pooling beside a naive one in float64."""

import math

import pytest
import torch

from hjepa_models.layers.attention_pool import AttentionPool


def made(dim, heads, device):
    pool = AttentionPool(dim, heads)
    pool.init_weights(torch.Generator().manual_seed(0))
    return pool.double().to(device)


def drawn(*shape, seed, device):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(device)


def test_it_starts_as_the_mean_and_learns_from_the_start(device):
    pool, tokens = made(12, 3, device), drawn(4, 7, 12, seed=1, device=device)
    pooled = pool(tokens)
    torch.testing.assert_close(pooled, tokens.mean(1))
    pooled.square().sum().backward()
    assert (pool.query_token.grad != 0).all()


@pytest.mark.parametrize("heads", [1, 2, 6])
def test_every_head_weighs_its_own_channels(device, heads):
    pool, tokens = made(12, heads, device), drawn(3, 5, 12, seed=heads, device=device)
    pool.query_token.data = drawn(12, seed=9, device=device)
    query, key = pool.query_token.detach(), pool.key.weight.detach()
    width = 12 // heads
    wanted = torch.zeros_like(tokens[:, 0])
    for image in range(3):
        for head in range(heads):
            own = slice(head * width, (head + 1) * width)
            scores = [float(query[own] @ (key @ token)[own]) for token in tokens[image]]
            total = sum(map(math.exp, scores))
            for score, token in zip(scores, tokens[image], strict=True):
                wanted[image, own] += math.exp(score) / total * token[own]
    torch.testing.assert_close(pool(tokens), wanted)
    torch.testing.assert_close(pool.weights(tokens).sum(1), torch.ones_like(tokens[:, 0, :heads]))


def test_the_order_of_tokens_does_not_matter(device):
    pool, tokens = made(8, 4, device), drawn(2, 9, 8, seed=3, device=device)
    pool.query_token.data = drawn(8, seed=9, device=device)
    torch.testing.assert_close(pool(tokens), pool(tokens.flip(1)))
    assert not torch.allclose(pool(tokens), tokens.mean(1))
