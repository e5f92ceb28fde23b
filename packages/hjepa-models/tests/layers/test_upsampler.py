import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from hjepa_models import dense_canvas, scatter_to_canvas
from hjepa_models.canvas import Canvas
from hjepa_models.grid import gather_tokens, num_tokens
from hjepa_models.initialization import construct
from hjepa_models.layers.upsampler import (
    PLACE_DIM,
    PatchUpsampler,
    children_index,
    interpolate_at,
    place_embedding,
    sample_children,
    upsampling_ratio,
)
from hjepa_models.pooling import upsample_canvas
from hjepa_models.random import row_seeds

MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}
axes = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=3)


def drawn(pairs, seed, device, known=1.0, batch=2, width=3):
    """A canvas of random tokens, its output grid and some positions on it, out of order and with repetitions."""
    grid = tuple(size for size, _ in pairs)
    output_grid = tuple(size * factor for size, factor in pairs)
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(batch, num_tokens(grid), width, generator=generator, dtype=torch.float64)
    weight = torch.rand(batch, num_tokens(grid), generator=generator, dtype=torch.float64)
    weight = weight * (torch.rand(weight.shape, generator=generator) < known) if known < 1 else weight
    index = torch.randint(0, num_tokens(output_grid), (batch, 7), generator=generator)
    return Canvas(values.to(device), weight.to(device), grid), output_grid, index.to(device)


def naive(canvas, output_grid, index):
    """The interpolation by loops, one output token after another."""
    places = list(itertools.product(*map(range, canvas.grid)))
    out = torch.zeros(*index.shape, canvas.values.shape[-1], dtype=torch.float64)
    for b, k in itertools.product(*map(range, index.shape)):
        position, rest = [], int(index[b, k])
        for size, fine in reversed(list(zip(canvas.grid, output_grid, strict=True))):
            rest, place = divmod(rest, fine)
            position.insert(0, min(max((place + 0.5) / (fine // size) - 0.5, 0), size - 1))
        total = norm = 0.0
        for n, place in enumerate(places):
            share = math.prod(max(0.0, 1 - abs(x - p)) for x, p in zip(position, place, strict=True))
            share *= float(canvas.weight[b, n])
            total, norm = total + share * canvas.values[b, n].cpu(), norm + share
        if norm:
            out[b, k] = total / norm
    return out


@given(axes, st.sampled_from([0.3, 0.7, 1.0]), st.integers(0, 1000))
def test_equals_a_naive_loop_where_some_tokens_are_unknown(device, pairs, known, seed):
    canvas, output_grid, index = drawn(pairs, seed, device, known)
    torch.testing.assert_close(interpolate_at(canvas, output_grid, index).cpu(), naive(canvas, output_grid, index))


@given(axes, st.integers(0, 1000))
def test_of_a_whole_canvas_equals_torch(device, pairs, seed):
    canvas, output_grid, index = drawn(pairs, seed, device)
    canvas = Canvas(canvas.values, torch.ones_like(canvas.weight), canvas.grid)
    maps = canvas.values.transpose(1, 2).reshape(2, 3, *canvas.grid)
    mode = MODES[len(output_grid)]
    dense = torch.nn.functional.interpolate(maps, output_grid, mode=mode, align_corners=False).flatten(2).mT
    torch.testing.assert_close(interpolate_at(canvas, output_grid), dense)
    torch.testing.assert_close(interpolate_at(canvas, output_grid, index), gather_tokens(dense, index))


@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(1, 4), st.integers(0, 1000))
def test_equals_the_dense_upsampling_at_one_ratio(device, grid, factor, seed):
    canvas, output_grid, index = drawn([(size, factor) for size in grid], seed, device, 0.7)
    dense = upsample_canvas(canvas, output_grid, factor).values
    # The dense matrix is computed in float32.
    torch.testing.assert_close(
        interpolate_at(canvas, output_grid, index), gather_tokens(dense, index), rtol=1e-4, atol=1e-5
    )


def test_only_the_tokens_that_are_asked_for_are_computed(device):
    canvas = dense_canvas(torch.randn(1, 64, 16, device=device), (8, 8))
    index = torch.arange(5, device=device)[None]
    upsampler = PatchUpsampler(16, "learned", 8).to(device)
    with _Seen() as seen:
        upsampler(canvas, (512, 512), index)
    # The embeddings of the 64 x 64 places in a cell are the largest; the output grid holds 512 x 512 x 16 numbers.
    assert max(seen.sizes) == 64 * 64 * PLACE_DIM


class _Seen(TorchDispatchMode):
    """Keeps the name of each operation and the size of its largest result."""

    def __init__(self):
        super().__init__()
        self.names, self.sizes = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.append(func.overloadpacket.__name__)
        self.sizes.extend(t.numel() for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, torch.Tensor))
        return out


@pytest.mark.parametrize(
    ("grid", "output_grid", "corners"), [((4, 4), (8, 8), 4), ((3, 4, 4), (3, 8, 8), 4), ((1, 4), (8, 8), 2)]
)
def test_an_axis_that_does_not_change_costs_nothing(device, grid, output_grid, corners):
    canvas = dense_canvas(torch.randn(1, num_tokens(grid), 3, device=device), grid)
    with _Seen() as seen:
        interpolate_at(canvas, output_grid)
    assert seen.names.count("index_select") == corners


def test_what_an_unknown_token_holds_does_not_matter(device):
    canvas, output_grid, index = drawn([(3, 2), (3, 2)], 0, device, 0.5)
    changed = torch.where(canvas.weight.unsqueeze(-1) > 0, canvas.values, 1e6)
    other = Canvas(changed, canvas.weight, canvas.grid)
    upsampler = _trained("learned", device)
    for function in (interpolate_at, upsampler):
        assert torch.equal(function(canvas, output_grid, index), function(other, output_grid, index))
    nothing = Canvas(canvas.values, torch.zeros_like(canvas.weight), canvas.grid)
    for function in (interpolate_at, upsampler):
        assert function(nothing, output_grid).abs().max() == 0


def test_gradients_of_the_interpolation_are_those_of_finite_differences(device):
    canvas, output_grid, index = drawn([(2, 3), (2, 1)], 0, device)

    def interpolate(values, weight):
        return interpolate_at(Canvas(values, weight, canvas.grid), output_grid, index)

    assert torch.autograd.gradcheck(interpolate, (canvas.values.requires_grad_(), canvas.weight.requires_grad_()))


def _trained(kind, device, dtype=torch.float64):
    """An upsampler of width 3 whose last map has left zero."""
    upsampler = construct(lambda: PatchUpsampler(3, kind, 8), 0, device).to(dtype)
    if kind == "learned":
        drawn_weight = torch.randn(upsampler.output.weight.shape, generator=torch.Generator().manual_seed(1))
        upsampler.load_state_dict({**upsampler.state_dict(), "output.weight": drawn_weight})
    return upsampler


@given(axes, st.integers(0, 1000))
def test_learned_starts_as_bilinear_and_holds_for_every_ratio(device, pairs, seed):
    canvas, output_grid, index = drawn(pairs, seed, device, 0.8)
    fresh = construct(lambda: PatchUpsampler(3, "learned", 8), 0, device).double()
    assert torch.equal(fresh(canvas, output_grid, index), interpolate_at(canvas, output_grid, index))
    trained = _trained("learned", device)
    some, dense = trained(canvas, output_grid, index), trained(canvas, output_grid)
    torch.testing.assert_close(some, gather_tokens(dense, index))


@given(axes, st.integers(0, 1000))
def test_the_residual_is_the_perceptron_of_nearest_token_and_place(device, pairs, seed):
    canvas, output_grid, index = drawn(pairs, seed, device)
    ratio = upsampling_ratio(canvas.grid, output_grid)
    upsampler = _trained("learned", device)
    residual = upsampler(canvas, output_grid, index) - interpolate_at(canvas, output_grid, index)
    cells = place_embedding(ratio, device).double()
    weight = torch.cat([upsampler.token.weight, upsampler.place.weight], dim=1)
    for b, k in itertools.product(*map(range, index.shape)):
        coarse = inside = rest = 0
        rest = int(index[b, k])
        places = []
        for fine in reversed(output_grid):
            rest, place = divmod(rest, fine)
            places.insert(0, place)
        for place, size, factor in zip(places, canvas.grid, ratio, strict=True):
            coarse, inside = coarse * size + place // factor, inside * factor + place % factor
        seen = torch.cat([canvas.values[b, coarse], cells[inside]])
        hidden = torch.nn.functional.gelu(weight @ seen + upsampler.token.bias)
        torch.testing.assert_close(residual[b, k], upsampler.output(hidden))


@pytest.mark.parametrize("ratio", [(1,), (8,), (1, 1), (8, 8), (2, 4, 4), (1, 16, 16)])
def test_places_of_a_cell_are_told_apart_and_so_are_ratios(device, ratio):
    here = place_embedding(ratio, device)
    distance = torch.cdist(here, here) + 10 * torch.eye(len(here), device=device)
    assert distance.min() > 0.3
    for times in (2, 3):
        other = place_embedding(tuple(times * factor for factor in ratio), device)
        assert torch.cdist(here, other).min() > 0.3


@pytest.mark.parametrize("kind", ["bilinear", "learned"])
def test_gradients_reach_every_parameter_and_the_tokens(device, kind):
    upsampler = construct(lambda: PatchUpsampler(3, kind, 8), 0, device)
    tokens = torch.randn(2, 4, 3, device=device, requires_grad=True)
    optimizer = torch.optim.SGD([tokens, *upsampler.parameters()], lr=0.1)
    # The first step moves the last map off zero, the second reaches what is before it.
    for _ in range(2):
        optimizer.zero_grad()
        upsampler(dense_canvas(tokens, (2, 2)), (4, 4)).square().sum().backward()
        optimizer.step()
    for name, parameter in (*upsampler.named_parameters(), ("tokens", tokens)):
        assert (parameter.grad != 0).double().mean() > 0.9, name


def test_learned_fits_what_bilinear_cannot(device):
    # Every output token is the coarse one plus a constant of its place: a checkerboard.
    upsampler = construct(lambda: PatchUpsampler(3, "learned", 32), 0, device)
    tokens = torch.randn(8, 4, 3, generator=torch.Generator().manual_seed(0)).to(device)
    canvas = dense_canvas(tokens, (2, 2))
    board = (torch.arange(8, device=device)[:, None] + torch.arange(8, device=device)) % 2 * 2.0 - 1
    target = interpolate_at(canvas, (8, 8)) + board.flatten()[:, None]
    optimizer = torch.optim.Adam(upsampler.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        loss = (upsampler(canvas, (8, 8)) - target).square().mean()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.05


@pytest.mark.parametrize("kind", ["bilinear", "learned"])
def test_half_precision_and_autocast_are_finite(device, kind):
    tokens = torch.randn(2, 4, 3, device=device)
    canvas, index = dense_canvas(tokens, (2, 2)), torch.tensor([[3, 7, 15]] * 2, device=device)
    upsampler = _trained(kind, device, torch.float32)
    exact = upsampler(canvas, (4, 4), index)
    with torch.autocast(device.type, torch.bfloat16):
        inside = upsampler(canvas, (4, 4), index)
    half = upsampler.bfloat16()(Canvas(tokens.bfloat16(), canvas.weight, (2, 2)), (4, 4), index)
    for out in (inside, half):
        assert out.dtype == torch.float32
        torch.testing.assert_close(out, exact, atol=0.2, rtol=0.1)


def test_builds_without_storage_and_draws_no_global_numbers(device):
    assert construct(lambda: PatchUpsampler(3, "learned", 8), 0, "meta").output.weight.is_meta
    state = torch.get_rng_state()
    first, second = (construct(lambda: PatchUpsampler(3, "learned", 8), 5, device) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert float(first.token.weight.detach().std()) == pytest.approx(3**-0.5, rel=0.4)
    assert list(PatchUpsampler(3).parameters()) == []


def test_at_most_one_graph_per_ratio(device):
    upsampler = _trained("learned", device, torch.float32)
    tokens = torch.randn(2, 4, 3, device=device)

    def step(tokens, index, output_grid):
        return upsampler(dense_canvas(tokens, (2, 2)), output_grid, index)

    counter = CompileCounter()
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for _ in range(2):
        for output_grid in ((16, 16), (8, 8), (4, 4)):
            index = torch.randint(0, num_tokens(output_grid), (2, 5), device=device)
            torch.testing.assert_close(compiled(tokens, index, output_grid), step(tokens, index, output_grid))
    assert counter.frame_count <= 3


@given(axes)
def test_children_are_what_a_mask_becomes_by_nearest_neighbour(device, pairs):
    grid = tuple(size for size, _ in pairs)
    output_grid = tuple(size * factor for size, factor in pairs)
    numbers = torch.arange(num_tokens(grid), device=device)
    fine = numbers.view(1, 1, *grid).float()
    padded = fine.view(1, 1, *(1,) * (3 - len(grid)), *grid)
    sizes = (*(1,) * (3 - len(grid)), *output_grid)
    parent = torch.nn.functional.interpolate(padded, sizes, mode="nearest").flatten().long()
    index = numbers.flip(0)[None]
    children = children_index(index, grid, output_grid).view(len(numbers), -1)
    for token, of_token in zip(index[0], children, strict=True):
        assert torch.equal(of_token, (parent == token).nonzero().flatten())


def test_children_are_row_major_inside_each_token():
    index = torch.tensor([[3, 0], [1, 1]])
    children = children_index(index, (2, 2), (4, 6))
    assert children.tolist() == [
        [15, 16, 17, 21, 22, 23, 0, 1, 2, 6, 7, 8],
        [3, 4, 5, 9, 10, 11, 3, 4, 5, 9, 10, 11],
    ]


@given(axes, st.integers(0, 2**40), st.data())
def test_drawn_children_are_distinct_and_pure_in_seed_row_and_token(device, pairs, seed, data):
    grid = tuple(size for size, _ in pairs)
    output_grid = tuple(size * factor for size, factor in pairs)
    ratio = num_tokens(upsampling_ratio(grid, output_grid))
    count = data.draw(st.integers(1, ratio))
    index = torch.arange(num_tokens(grid), device=device).expand(3, -1)
    drawn = sample_children(index, grid, output_grid, count, seed)
    children = children_index(index, grid, output_grid).view(3, -1, ratio)
    chosen = drawn.view(3, -1, count)
    assert ((chosen.unsqueeze(-1) == children.unsqueeze(-2)).sum(-1) == 1).all()
    assert (chosen.diff(dim=-1) > 0).all()
    assert torch.equal(drawn, sample_children(index, grid, output_grid, count, torch.tensor(seed)))
    order = torch.randperm(index.shape[1], device=device)
    assert torch.equal(
        sample_children(index[:, order], grid, output_grid, count, seed).view(chosen.shape), chosen[:, order]
    )
    assert torch.equal(sample_children(index[:2], grid, output_grid, count, seed), drawn[:2])
    if count == ratio:
        assert torch.equal(chosen, children)


def test_drawn_children_are_uniform_and_independent(device):
    index = torch.arange(16, device=device).expand(32, -1)
    inside = torch.zeros(16, device=device)
    pairs = torch.zeros(16, 16, device=device)
    for seed in range(20):
        chosen = sample_children(index, (4, 4), (16, 16), 4, seed).view(-1, 4)
        places = (chosen // 16 % 4) * 4 + chosen % 4
        hit = torch.zeros(len(places), 16, device=device).scatter_(1, places, 1)
        inside += hit.sum(0)
        pairs += hit.T @ hit
    draws = 20 * 32 * 16
    torch.testing.assert_close(inside / draws, torch.full_like(inside, 4 / 16), atol=0.02, rtol=0)
    off = ~torch.eye(16, dtype=torch.bool, device=device)
    torch.testing.assert_close(pairs[off] / draws, torch.full_like(pairs[off], 4 * 3 / (16 * 15)), atol=0.012, rtol=0)


def test_drawn_children_differ_between_steps_rows_and_tokens(device):
    index = torch.arange(4, device=device).expand(4, -1)
    draws = torch.stack([sample_children(index, (2, 2), (32, 32), 8, seed).view(4, 4, 8) for seed in range(4)])
    places = (draws // 32 % 16) * 16 + draws % 16
    assert len({tuple(draw) for draw in places.flatten(0, 2).tolist()}) == 64


@pytest.mark.parametrize("views", [1, 2])
def test_processes_draw_what_one_would(device, monkeypatch, views):
    index = torch.arange(4, device=device).expand(12, -1)
    seeds = row_seeds(7, 12, device, views)
    whole = sample_children(index, (2, 2), (8, 8), 3, seeds).view(views, 2, 6 // views, -1)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        part = sample_children(index[:6], (2, 2), (8, 8), 3, row_seeds(7, 6, device, views))
        assert torch.equal(part, whole[:, rank].flatten(0, 1))


def test_steps_share_one_graph(device):
    index = torch.arange(4, device=device).expand(2, -1)
    counter = CompileCounter()
    compiled = torch.compile(sample_children, fullgraph=True, backend=counter)
    for step in range(4):
        seed = torch.tensor(step, device=device)
        assert torch.equal(compiled(index, (2, 2), (4, 4), 2, seed), sample_children(index, (2, 2), (4, 4), 2, step))
    assert counter.frame_count == 1


CANVAS = Canvas(torch.zeros(1, 4, 3), torch.ones(1, 4), (2, 2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: interpolate_at(CANVAS, (4, 5)), r"output_grid=\(4, 5\): is no multiple of the grid \(2, 2\)"),
        (lambda: interpolate_at(CANVAS, (4,)), r"output_grid=\(4,\): is no multiple"),
        (lambda: children_index(torch.zeros(1, 1).long(), (4, 4), (2, 2)), "use an output patch that divides"),
        (lambda: sample_children(torch.zeros(1, 1).long(), (2, 2), (4, 4), 5, 0), "allowed: 1 to 4"),
        (lambda: sample_children(torch.zeros(1, 1).long(), (2, 2), (4, 4), 0, 0), "count=0"),
        (lambda: PatchUpsampler(3, "bicubic"), "allowed: bilinear, learned"),
        (lambda: PatchUpsampler(3, "learned", 0), "hidden_dim=0: must be above 0"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_masked_tokens_are_upsampled_from_those_that_are_known(device):
    tokens = torch.randn(1, 2, 3, device=device)
    index = torch.tensor([[0, 1]], device=device)
    canvas = scatter_to_canvas(tokens, index, (2, 2))
    out = interpolate_at(canvas, (4, 4)).view(4, 4, 3)
    # The lower row of the canvas is unknown: output row 2 sees the upper one from afar, row 3 nothing.
    torch.testing.assert_close(out[2], out[0])
    assert out[3].abs().max() == 0
