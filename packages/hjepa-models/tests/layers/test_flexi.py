from functools import reduce

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.layers.patch_embed import resample_patch_embed
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

from hjepa_models.grid import num_tokens
from hjepa_models.initialization import construct, initialize
from hjepa_models.layers.flexi import FlexiPatchEmbed, axis_resize, pseudo_inverse, resize_patch_weights
from hjepa_models.layers.patch import LinearStem

MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}
sizes = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=3)


def resized_patches(patches, channels, old, new):
    pixels = patches.view(len(patches), channels, *old)
    return torch.nn.functional.interpolate(pixels, new, mode=MODES[len(old)], align_corners=False).flatten(1)


def resize_matrix(old, new, antialias):
    """The resize of one axis by torch's own interpolation of unit vectors, which antialiases images only."""
    unit = torch.eye(old, dtype=torch.float64)[:, None, None]
    options = {"mode": "bilinear", "align_corners": False, "antialias": antialias}
    return torch.nn.functional.interpolate(unit, (1, new), **options)[:, 0, 0].T.clone(
        memory_format=torch.contiguous_format
    )


@given(sizes, st.integers(1, 3), st.booleans(), st.integers(0, 1000))
def test_where_no_axis_shrinks_a_resized_patch_gives_the_same_token(device, pairs, channels, antialias, seed):
    old, new = zip(*(sorted(pair) for pair in pairs), strict=True)
    generator = torch.Generator().manual_seed(seed)
    patches, weight = (
        torch.randn(rows, channels * num_tokens(old), generator=generator, dtype=torch.float64).to(device)
        for rows in (4, 5)
    )
    resized = resize_patch_weights(weight, channels, old, new, antialias=antialias)
    tokens = resized_patches(patches, channels, old, new) @ resized.T
    torch.testing.assert_close(tokens, patches @ weight.T, atol=1e-11, rtol=1e-11)


@given(sizes, st.booleans(), st.integers(0, 1000))
def test_equals_the_pseudo_inverse_of_the_whole_resize(device, pairs, antialias, seed):
    old, new = zip(*pairs, strict=True)
    resize = reduce(torch.kron, [resize_matrix(*pair, antialias) for pair in pairs])
    weight = torch.randn(3, num_tokens(old), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected = weight @ torch.linalg.pinv(resize.T).T
    resized = resize_patch_weights(weight.to(device), 1, old, new, antialias=antialias)
    torch.testing.assert_close(resized.cpu(), expected, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize(("old", "new"), [((16, 16), (8, 8)), ((7, 5), (9, 3)), ((4, 4), (14, 6))])
def test_equals_timm(device, old, new, antialias):
    weight = torch.randn(6, 3, *old, device=device)
    expected = resample_patch_embed(weight, new, interpolation="bilinear", antialias=antialias).flatten(1)
    resized = resize_patch_weights(weight.flatten(1), 3, old, new, antialias=antialias)
    torch.testing.assert_close(resized, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("old", "new"), [(32, 31), (31, 32), (48, 17), (17, 48), (32, 1)])
@pytest.mark.parametrize("antialias", [True, False])
def test_every_resize_has_full_rank_and_rows_of_sum_one(old, new, antialias):
    matrix = torch.tensor([[float(value) for value in row] for row in axis_resize(old, new, antialias)]).double()
    torch.testing.assert_close(matrix.sum(1), torch.ones(new).double())
    assert torch.linalg.cond(matrix) < 5
    inverse = torch.tensor(pseudo_inverse(old, new, antialias), dtype=torch.float64)
    product = matrix @ inverse.T if new <= old else inverse.T @ matrix
    torch.testing.assert_close(product, torch.eye(min(old, new)).double(), atol=1e-6, rtol=0)


def test_weights_that_shrink_all_count_only_with_antialiasing(device):
    weight = torch.randn(2, 8 * 8, device=device, requires_grad=True)
    (smooth,) = torch.autograd.grad(resize_patch_weights(weight, 1, (8, 8), (2, 2)).sum(), weight)
    (sharp,) = torch.autograd.grad(resize_patch_weights(weight, 1, (8, 8), (2, 2), antialias=False).sum(), weight)
    assert (smooth != 0).all()
    assert (sharp != 0).double().mean() == 0.25


@pytest.mark.parametrize("new", [(2, 5), (4, 4), (3, 2)])
def test_gradients_are_those_of_finite_differences(device, new):
    weight = torch.randn(2, 2 * 12, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: resize_patch_weights(w, 2, (3, 4), new), weight)


def test_at_its_own_size_it_is_the_linear_stem(device):
    flexi, linear = FlexiPatchEmbed(3, (4, 2), 7).to(device), LinearStem(3, (4, 2), 7).to(device)
    linear.load_state_dict(flexi.state_dict())
    patches = torch.randn(2, 5, 24, device=device)
    assert torch.equal(flexi(patches), linear(patches))
    assert torch.equal(flexi(patches, (4, 2)), linear(patches))


@pytest.mark.parametrize("patch", [(8, 8), (2, 2), (1, 1), (3, 6)])
def test_any_size_gives_tokens_and_gradients_reach_every_weight(device, patch):
    stem = FlexiPatchEmbed(3, (4, 4), 7).to(device)
    patches = torch.randn(2, 5, 3 * num_tokens(patch), device=device)
    tokens = stem(patches, patch)
    assert tokens.shape == (2, 5, 7)
    expected = patches @ resize_patch_weights(stem.proj.weight, 3, (4, 4), patch).T + stem.proj.bias
    torch.testing.assert_close(tokens, expected)
    tokens.square().sum().backward()
    assert (stem.proj.weight.grad != 0).all()
    assert (stem.proj.bias.grad != 0).all()


def test_a_smooth_image_gives_about_the_same_tokens_at_every_size(device):
    stem = construct(lambda: _Initialised(3, (8, 8), 64), 0, device)
    ramp = torch.linspace(-1, 1, 16, device=device)
    image = (ramp[:, None] + 0.5 * ramp).expand(1, 3, 16, 16)
    reference = stem(image[..., :8, :8].reshape(1, 1, -1))
    finer = torch.nn.functional.interpolate(image[..., :8, :8], (16, 16), mode="bilinear").reshape(1, 1, -1)
    coarser = torch.nn.functional.interpolate(image[..., :8, :8], (4, 4), mode="bilinear", antialias=True)
    torch.testing.assert_close(stem(finer, (16, 16)), reference, atol=1e-5, rtol=1e-5)
    error = (stem(coarser.reshape(1, 1, -1), (4, 4)) - reference).norm() / reference.norm()
    assert error < 0.2


class _Initialised(FlexiPatchEmbed):
    def init_weights(self, generator):
        initialize(self, generator)


def test_it_is_initialised_as_the_linear_stem_is(device):
    stem = construct(lambda: _Initialised(3, (8, 8), 256), 0, device)
    # A normal law that is cut at two deviations has 0.88 of the deviation.
    assert float(stem.proj.weight.detach().std()) == pytest.approx(0.88 * (3 * 64) ** -0.5, rel=0.02)
    assert stem.proj.bias.abs().max() == 0
    assert construct(lambda: _Initialised(3, (8, 8), 4), 0, "meta").proj.weight.is_meta


def test_autocast_does_not_touch_the_resize(device):
    stem = FlexiPatchEmbed(3, (4, 4), 7).to(device)
    patches = torch.randn(2, 5, 3 * 64, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        inside = resize_patch_weights(stem.proj.weight, 3, (4, 4), (8, 8))
        tokens = stem(patches, (8, 8))
    assert torch.equal(inside, resize_patch_weights(stem.proj.weight, 3, (4, 4), (8, 8)))
    assert tokens.dtype == torch.bfloat16
    torch.testing.assert_close(tokens.float(), stem(patches, (8, 8)), atol=0.05, rtol=0.05)


def test_half_precision_weights_stay_half_precision(device):
    stem = FlexiPatchEmbed(3, (4, 4), 7).to(device)
    expected = resize_patch_weights(stem.proj.weight.bfloat16().float(), 3, (4, 4), (2, 2)).bfloat16()
    half = stem.to(torch.bfloat16)
    assert torch.equal(resize_patch_weights(half.proj.weight, 3, (4, 4), (2, 2)), expected)
    assert half(torch.randn(1, 2, 12, device=device, dtype=torch.bfloat16), (2, 2)).isfinite().all()


def test_a_finite_set_of_sizes_is_compiled_a_finite_number_of_times(device):
    stem = FlexiPatchEmbed(3, (4, 4), 7).to(device)
    counter = CompileCounter()
    compiled = torch.compile(stem, fullgraph=True, dynamic=False, backend=counter)
    for patch in ((8, 8), (4, 4), (2, 2), (1, 1), (8, 8), (4, 4), (2, 2), (1, 1)):
        patches = torch.randn(2, 5, 3 * num_tokens(patch), device=device)
        torch.testing.assert_close(compiled(patches, patch), stem(patches, patch))
        if patch == (1, 1):
            seen = counter.frame_count
    assert counter.frame_count == seen == 4
    compiled(torch.randn(2, 5, 12, device=device), (2, 2)).sum().backward()
    assert (stem.proj.weight.grad != 0).all()


def test_the_pseudo_inverse_is_computed_once(device):
    stem = FlexiPatchEmbed(1, (5, 5), 2).to(device)
    stem(torch.randn(1, 1, 49, device=device), (7, 7))
    misses = pseudo_inverse.cache_info().misses
    for _ in range(3):
        stem(torch.randn(1, 1, 49, device=device), (7, 7))
    assert pseudo_inverse.cache_info().misses == misses


def test_a_mode_without_storage_leaves_nothing_behind():
    with FakeTensorMode():
        assert resize_patch_weights(torch.empty(2, 121), 1, (11, 11), (13, 13)).shape == (2, 169)
    with torch.device("meta"):
        assert not resize_patch_weights(torch.ones(2, 121, device="cpu"), 1, (11, 11), (13, 13)).is_meta
    assert resize_patch_weights(torch.ones(2, 121), 1, (11, 11), (13, 13)).isfinite().all()


@pytest.mark.parametrize("strict", [True, False])
def test_it_can_be_exported(strict):
    class AtTwo(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = FlexiPatchEmbed(3, (4, 4), 7)

        def forward(self, patches):
            return self.stem(patches, (2, 2))

    module, patches = AtTwo(), torch.randn(2, 5, 12)
    exported = torch.export.export(module, (patches,), strict=strict).module()
    torch.testing.assert_close(exported(patches), module(patches))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: resize_patch_weights(torch.ones(2, 12), 3, (2, 2), (4,)), r"new=\(4,\): has 1 axes"),
        (lambda: resize_patch_weights(torch.ones(2, 12), 3, (2, 3), (4, 4)), "allowed: 18 columns"),
        (lambda: resize_patch_weights(torch.ones(2, 12), 3, (2, 2), (4, 0)), r"new=\(4, 0\): needs one positive"),
        (lambda: FlexiPatchEmbed(3, (2, 2), 4)(torch.ones(1, 1, 12), (4, 4)), "hold 12 values; allowed: 48"),
        (lambda: FlexiPatchEmbed(3, (2, 2), 4)(torch.ones(1, 1, 48)), "hold 48 values; allowed: 12"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
