import pytest
import torch
from torch import nn

from hjepa_models.aggregate import AggregateConfig, Aggregation
from hjepa_models.objectives import info_nce


def naive(module, tokens, weight):
    """Maps and means by plain loops, in float64."""
    linears = [layer for layer in module.projection if isinstance(layer, nn.Linear)]

    def project(x):
        for number, layer in enumerate(linears):
            x = layer.weight.double() @ x + layer.bias.double()
            x = x if number == len(linears) - 1 else x.clamp(min=0)
        return x

    out = []
    for b in range(len(tokens)):
        share = weight[b].double() / weight[b].double().sum()
        vectors = [x.double() for x in tokens[b]]
        if module.config.aggregate is Aggregation.project_first:
            vectors = [project(x) for x in vectors]
        mean = sum(s * x for s, x in zip(share, vectors, strict=True))
        out.append(mean if module.config.aggregate is Aggregation.project_first else project(mean))
    return torch.stack(out)


@pytest.mark.parametrize("aggregate", list(Aggregation))
@pytest.mark.parametrize("depth", [1, 3])
def test_equals_a_naive_float64_loop(device, aggregate, depth):
    config = AggregateConfig(hidden_dim=7, out_dim=3, depth=depth, aggregate=aggregate)
    module = config.build(5, seed=1, device=device)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    tokens, weight = torch.randn(2, 4, 5, device=device), torch.rand(2, 4, device=device)
    torch.testing.assert_close(module(tokens, weight).double(), naive(module, tokens, weight), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(module(tokens), module(tokens, torch.full_like(weight, 0.3)))


def test_the_order_matters_only_where_there_is_something_between(device):
    for depth, equal in ((1, True), (2, False)):
        modules = [
            AggregateConfig(hidden_dim=8, out_dim=3, depth=depth, aggregate=a).build(5, device=device)
            for a in Aggregation
        ]
        tokens = torch.randn(2, 4, 5, device=device)
        assert torch.allclose(modules[0](tokens), modules[1](tokens), atol=1e-5) == equal


@pytest.mark.parametrize("aggregate", list(Aggregation))
def test_unknown_tokens_do_not_count_and_an_empty_image_is_finite(device, aggregate):
    module = AggregateConfig(hidden_dim=8, out_dim=3, aggregate=aggregate).build(5, device=device)
    tokens = torch.randn(2, 4, 5, device=device)
    weight = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]], device=device)
    out = module(tokens, weight)
    torch.testing.assert_close(out[:1], module(tokens[:1, :2]))
    assert out[1].isfinite().all()


def test_it_learns_to_tell_images_apart(device):
    module = AggregateConfig(hidden_dim=16, out_dim=8).build(6, seed=0, device=device)
    content = torch.randn(8, 1, 6, device=device)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    losses = []
    for _ in range(60):
        views = [content + 0.3 * torch.randn(8, 5, 6, device=device) for _ in range(2)]
        loss = info_nce(module(views[0]), module(views[1]), 0.2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_seed_meta_and_half_precision(device):
    config = AggregateConfig(hidden_dim=8, out_dim=3)
    first, second = (config.build(5, seed=2, device=device) for _ in range(2))
    tokens = torch.randn(2, 4, 5, device=device)
    assert torch.equal(first(tokens), second(tokens))
    assert all(parameter.is_meta for parameter in config.build(5, device="meta").parameters())
    with torch.autocast(device.type, torch.bfloat16):
        assert first(tokens.bfloat16()).isfinite().all()
    assert first.bfloat16()(tokens.bfloat16()).isfinite().all()


@pytest.mark.parametrize("aggregate", list(Aggregation))
def test_compiles_in_one_graph(device, aggregate):
    module = AggregateConfig(hidden_dim=8, out_dim=3, aggregate=aggregate).build(5, device=device)
    tokens, weight = torch.randn(2, 4, 5, device=device), torch.rand(2, 4, device=device)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(tokens, weight), module(tokens, weight))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"aggregate": "max"}, "aggregate='max': unknown choice; allowed: mean_first, project_first"),
        ({"depth": 0}, "depth=0: must be above 0"),
        ({"out_dim": -1}, "out_dim=-1: must be above 0"),
    ],
)
def test_bad_configs(fields, message):
    with pytest.raises(ValueError, match=message):
        AggregateConfig(**fields)
