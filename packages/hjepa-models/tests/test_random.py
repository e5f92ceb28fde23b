import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hjepa_models.random import fold_in, gumbel, uniform


def splitmix(seed, count):
    """The hash in Python's unbounded integers."""
    mask = 2**64 - 1

    def mix(x):
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    key = mix((seed * 0x9E3779B97F4A7C15 + 0xBF58476D1CE4E5B9) & mask)
    return [mix((key ^ i) * 0x9E3779B97F4A7C15 & mask) for i in range(count)]


@given(st.integers(0, 2**62), st.integers(1, 30))
def test_bits_are_splitmix64_and_equal_for_int_and_tensor_seeds(device, seed, count):
    bits = fold_in(seed, torch.arange(count, device=device), device)
    assert [b % 2**64 for b in bits.tolist()] == splitmix(seed, count)
    assert torch.equal(bits, fold_in(torch.tensor(seed), torch.arange(count, device=device)))
    numbers = uniform(seed, (count,), device)
    assert numbers.tolist() == [((b >> 41) + 0.5) / 2**23 for b in splitmix(seed, count)]
    rows = uniform(torch.tensor([seed, seed + 1], device=device), (count,), device)
    assert torch.equal(rows, torch.stack([numbers, uniform(seed + 1, (count,), device)]))


def test_numbers_are_uniform_and_streams_are_not_related(device):
    streams = uniform(fold_in(torch.arange(64, device=device), 3, device), (4096,), device)
    assert 0 < streams.min() < 1e-4
    assert 1 - 1e-4 < streams.max() < 1
    counts = torch.histc(streams.cpu(), 64, 0, 1)
    assert ((counts - 4096) ** 2 / 4096).sum() < 63 + 5 * math.sqrt(2 * 63)
    assert torch.corrcoef(streams).triu(1).abs().max() < 5.5 / math.sqrt(4096)
    assert torch.corrcoef(streams[:, ::64].T).triu(1).abs().max() < 5.5 / 8
    noise = gumbel(0, (2**16,), device)
    assert noise.isfinite().all()
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.02)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, rel=0.03)
