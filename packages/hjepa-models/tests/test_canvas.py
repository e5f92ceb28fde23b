import torch
from hypothesis import given
from hypothesis import strategies as st

from hjepa_models import dense_canvas, scatter_to_canvas


@given(st.integers(1, 3), st.integers(1, 12), st.integers(0, 1000))
def test_scatter_equals_a_loop(device, batch, count, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(batch, count, 3, generator=generator, dtype=torch.float64).to(device)
    index = torch.randint(0, 12, (batch, count), generator=generator).to(device)
    canvas = scatter_to_canvas(tokens, index, (3, 4))
    for b in range(batch):
        for n in range(12):
            here = [tokens[b, k] for k in range(count) if index[b, k] == n]
            assert canvas.weight[b, n] == (1 if here else 0)
            expected = sum(here) / len(here) if here else torch.zeros(3, dtype=torch.float64, device=device)
            torch.testing.assert_close(canvas.values[b, n], expected)


def test_gradients_are_shared_between_duplicates(device):
    tokens = torch.randn(1, 3, 2, device=device, requires_grad=True)
    canvas = scatter_to_canvas(tokens, torch.tensor([[1, 1, 0]], device=device), (2,))
    canvas.values.sum().backward()
    assert tokens.grad[0, :, 0].tolist() == [0.5, 0.5, 1.0]


def test_half_precision_tokens_make_a_float32_canvas(device):
    tokens = torch.randn(1, 4, 2, device=device, dtype=torch.bfloat16)
    assert scatter_to_canvas(tokens, torch.arange(4, device=device)[None], (2, 2)).values.dtype == torch.float32
    dense = dense_canvas(tokens, (2, 2))
    assert dense.values.dtype == dense.weight.dtype == torch.float32
    assert dense.weight.min() == 1
