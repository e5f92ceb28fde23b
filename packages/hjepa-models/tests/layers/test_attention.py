import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from hjepa_models.layers import attention
from hjepa_models.layers.attention import Attention, AttentionBackend, attend, flex, group_mask
from hjepa_models.layers.positions import GridPositions, Place, Position

GROUP = (0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3)


@pytest.fixture(autouse=True)
def fresh_compiler(device):
    """Every kind of place is a graph of FlexAttention; all of them together would pass the compiler's limit."""
    if device.type == "cuda":
        torch.compiler.reset()


@torch.no_grad()
def place_of(device, position, *, grouped=False, prefix=0):
    positions = GridPositions(position, 32, 2, 1, 100.0, (3, 4))
    positions.init_weights(torch.Generator().manual_seed(0), 1.0)
    place = positions.to(device).places((3, 4), None, device, prefix)[0]
    return place._replace(group=torch.tensor(GROUP, device=device)) if grouped else place


def test_explicit_attention_equals_a_loop_in_float64(device):
    query, key, value = torch.randn(3, 1, 2, 4, 6, device=device)
    bias, group = torch.randn(1, 2, 4, 4, device=device), [0, 0, 1, 2]
    place = Place(bias=bias, group=torch.tensor(group, device=device))
    result = attend(query, key, value, place, AttentionBackend.explicit)
    for h in range(2):
        for i in range(4):
            seen = [j for j in range(4) if group[j] == 0 or group[j] == group[i]]
            scores = [
                math.exp(
                    float(query[0, h, i].double() @ key[0, h, j].double()) / math.sqrt(6) + float(bias[0, h, i, j])
                )
                for j in seen
            ]
            expected = sum(s * value[0, h, j].double() for s, j in zip(scores, seen, strict=True)) / sum(scores)
            torch.testing.assert_close(result[0, h, i].double(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("tokens", [3, 64, 65])
def test_few_tokens_go_to_the_efficient_kernel_of_a_gpu(device, monkeypatch, tokens):
    """Where there is no GPU the same path runs on the CPU, which computes it plainly."""
    if device.type == "cpu":
        monkeypatch.setattr(attention, "_slow_when_fused", lambda query: False)
        monkeypatch.setattr(attention, "_short_on_gpu", lambda query: query.shape[-2] <= 64)
    kernels = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, arguments=(), options=None):
            kernels.append(operator.name())
            return operator(*arguments, **(options or {}))

    query, key, value = torch.randn(3, 2, 2, tokens, 16, device=device, dtype=torch.bfloat16).requires_grad_()
    with Recorder():
        short = attend(query, key, value, Place())
    expected = attend(query, key, value, Place(), AttentionBackend.explicit)
    torch.testing.assert_close(short, expected, atol=0.03, rtol=0.03)
    plain = any("efficient" in name or name.endswith("softmax") for name in kernels)
    assert plain == (tokens <= 64), kernels


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("position", list(Position))
def test_backends_agree_in_value_and_gradient(device, qk_norm, grouped, position):
    layers = [Attention(32, 2, qk_norm=qk_norm, backend=backend).to(device) for backend in AttentionBackend]
    place = place_of(device, position, grouped=grouped)
    results = []
    for layer in layers:
        layer.load_state_dict(layers[0].state_dict())
        x = torch.linspace(-2, 2, 2 * 12 * 32, device=device).sin().view(2, 12, 32).requires_grad_()
        out = layer(x, place)
        out.square().sum().backward()
        results.append((out, x.grad))
    for one in results[1:]:
        for first, second in zip(results[0], one, strict=True):
            torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("position", list(Position))
@pytest.mark.parametrize("rows", [1, 2])
def test_flex_attention_computes_the_same(device, grouped, position, rows):
    """On a CPU it has no backward and is not what a model takes; the numbers are checked all the same."""
    place = place_of(device, position, grouped=grouped)
    if place.bias is not None:
        place = place._replace(bias=torch.cat([place.bias, 2 * place.bias])[:rows])
    query, key, value = torch.randn(3, 2, 2, 12, 16, device=device)
    expected = attend(query, key, value, place)
    torch.testing.assert_close(flex(query, key, value, place), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_flex_attention_is_taken_where_it_has_kernels_and_something_to_add():
    """Tensors without values are not on a CPU and FlexAttention refuses them: what passes was computed by sdpa."""

    def attend_on_meta(width, *, grouped):
        query = torch.empty(1, 2, 12, width, device="meta")
        place = Place(group=torch.empty(12, dtype=torch.int64, device="meta") if grouped else None)
        return attend(query, query, query, place, AttentionBackend.flex)

    assert attend_on_meta(15, grouped=True).shape == (1, 2, 12, 15)
    assert attend_on_meta(16, grouped=False).shape == (1, 2, 12, 16)
    with pytest.raises(ValueError, match="FlexAttention is only supported on"):
        attend_on_meta(16, grouped=True)


class Operators(TorchDispatchMode):
    """Keeps the names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.names.append(str(operator))
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("kernel", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_a_context_picks_the_kernel(device, kernel):
    layer = Attention(32, 2, qk_norm=False, backend=AttentionBackend.sdpa).to(device, torch.bfloat16)
    x = torch.randn(2, 12, 32, device=device, dtype=torch.bfloat16)
    with sdpa_kernel(kernel), Operators() as seen:
        chosen = layer(x)
    assert any("flash_attention" in name for name in seen.names) == (kernel is SDPBackend.FLASH_ATTENTION)
    torch.testing.assert_close(chosen, layer(x), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(
    ("dtype", "tokens", "trained", "fused_on_cpu"),
    [
        (torch.bfloat16, 1024, True, False),
        (torch.bfloat16, 1025, True, True),
        (torch.bfloat16, 12, False, True),
        (torch.float32, 12, True, True),
    ],
)
def test_auto_leaves_the_slow_kernel_of_a_cpu_alone(device, dtype, tokens, trained, fused_on_cpu):
    query, key, value = torch.randn(3, 1, 1, tokens, 8, device=device, dtype=dtype).requires_grad_(trained)
    with Operators() as seen:
        attend(query, key, value, Place(), AttentionBackend.auto)
    fused = any("scaled_dot_product" in name for name in seen.names)
    assert fused == (fused_on_cpu or query.is_cuda), seen.names


@pytest.mark.parametrize("position", list(Position))
@pytest.mark.parametrize("backend", list(AttentionBackend))
def test_weights_explain_the_output(device, position, backend):
    layer = Attention(32, 2, qk_norm=True, backend=backend).to(device)
    place, x = place_of(device, position, grouped=True), torch.randn(2, 12, 32, device=device)
    weights = layer.weights(x, place)
    assert weights.shape == (2, 2, 12, 12)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    assert weights[:, :, ~group_mask(place.group)].eq(0).all()
    value = layer.qkv(x).view(2, 12, 3, 2, 16)[:, :, 2]
    mixed = torch.einsum("bhij,bjhd->bihd", weights, value).flatten(2)
    torch.testing.assert_close(layer.proj(mixed), layer(x, place), atol=1e-5, rtol=1e-4)


def test_groups_do_not_see_one_another(device):
    layer = Attention(24, 2, qk_norm=False, backend=AttentionBackend.sdpa).to(device)
    place, x = Place(group=torch.tensor(GROUP, device=device)), torch.randn(1, 12, 24, device=device)
    before = layer(x, place)
    x[:, 4:7] += 1
    changed = (layer(x, place) - before).abs().amax((0, 2)) > 1e-6
    assert changed.tolist() == [False] * 4 + [True] * 3 + [False] * 5
    x[:, 0] += 1
    assert ((layer(x, place) - before).abs().amax((0, 2)) > 1e-6).all()


def test_normalised_queries_bound_the_logits(device):
    layer = Attention(32, 2, qk_norm=True, backend=AttentionBackend.explicit).to(device)
    x = torch.randn(2, 5, 32, device=device)
    small, large = layer(x), layer(1000 * x)
    assert (large / 1000 - small).abs().max() < 0.5  # the mixing barely changes, the values scale
