import itertools
import math

import pytest
import torch
from torch.nn import functional

from hjepa_models import EncoderConfig, HJEPAConfig, StemNorm
from hjepa_models.layers.norm import GlobalBatchNorm
from hjepa_models.layers.patch import ConvStem, LinearStem, OverlapStem, ResidualBlock, patchify, stage_strides


@pytest.mark.parametrize(("sizes", "patch"), [((12,), (3,)), ((8, 6), (4, 2)), ((4, 6, 4), (2, 3, 4))])
def test_patches_are_cut_row_major(device, sizes, patch):
    images = torch.randn(2, 3, *sizes, device=device)
    patches = patchify(images, patch)
    cells = itertools.product(*(range(size // p) for size, p in zip(sizes, patch, strict=True)))
    for number, cell in enumerate(cells):
        window = tuple(slice(c * p, (c + 1) * p) for c, p in zip(cell, patch, strict=True))
        assert torch.equal(patches[:, number], images[(slice(None), slice(None), *window)].flatten(1))


@pytest.mark.parametrize("blocks", [(), (1, 2)])
@pytest.mark.parametrize("patch", [(8,), (4, 4), (2, 4, 4), (7, 7), (1, 2)])
def test_conv_stem_sees_nothing_across_a_patch(device, patch, blocks):
    stem = ConvStem(3, patch, 16, (4, 8), blocks=blocks).to(device)
    patches = torch.randn(2, 5, 3 * torch.tensor(patch).prod(), device=device)
    tokens = stem(patches)
    assert tokens.shape == (2, 5, 16)
    changed = patches.clone()
    changed[:, 2] += 1
    moved = (stem(changed) - tokens).abs().amax((0, 2)) > 1e-6
    assert moved.tolist() == [False, False, True, False, False]


def test_conv_stem_halves_only_even_axes():
    assert stage_strides((2, 16), 3) == [(2, 2), (1, 2), (1, 2)]


def test_linear_stem_shape(device):
    assert LinearStem(3, (2, 2), 7).to(device)(torch.randn(2, 4, 12, device=device)).shape == (2, 4, 7)


@pytest.mark.parametrize("blocks", [(), (1, 2)])
@pytest.mark.parametrize("patch", [(4, 4), (6, 6), (2, 8, 8), (16,)])
def test_overlap_stem_gives_one_token_a_patch(device, patch, blocks):
    stem = OverlapStem(3, patch, 16, (4, 8), blocks=blocks).to(device)
    grid = (3,) * len(patch)
    images = torch.randn(2, 3, *(3 * side for side in patch), device=device)
    assert stem(images, None, grid).shape == (2, 3 ** len(patch), 16)


@pytest.mark.parametrize(("patch", "channels"), [(3, (4, 8)), (6, (4, 8)), (12, (4, 8)), (12, (4,)), (16, (4, 8))])
def test_overlap_stem_sees_all_of_its_patch(device, patch, channels):
    """Each pixel of a patch reaches its token, and no more of other patches than stages with a kernel of 3 can see."""
    stem = OverlapStem(1, (patch,), 8, channels).to(device)
    images = torch.randn(1, 1, 5 * patch, device=device, requires_grad=True)
    stem(images, None, (5,))[0, 2].sum().backward()
    seen = images.grad[0, 0].nonzero().flatten()
    strides = [stride for (stride,) in stage_strides((patch,), len(channels))]
    reach = sum(math.prod(strides[:stage]) for stage in range(len(channels)))
    assert 2 * patch - reach <= seen.min() <= 2 * patch
    assert 3 * patch - 1 <= seen.max() <= 3 * patch - 1 + reach


@pytest.mark.parametrize("blocks", [(), (1,)])
def test_overlap_stem_sees_visible_neighbours_and_nothing_hidden(device, blocks):
    stem = OverlapStem(3, (4, 4), 16, (8,), blocks=blocks).to(device)
    images = torch.randn(1, 3, 12, 12, device=device)
    changed = images.clone()
    changed[:, :, 4:8, 4:8] += 1  # the patch in the middle, number 4
    # Strided kernels reach up and to the left, those of a block to all sides.
    visible = torch.tensor([[0, 4, 5, 7, 8]], device=device)
    without = torch.tensor([[0, 5, 7, 8]], device=device)
    assert torch.equal(stem(images, without, (3, 3)), stem(changed, without, (3, 3)))
    moved = (stem(images, visible, (3, 3)) - stem(changed, visible, (3, 3))).abs().amax((0, 2)) > 1e-6
    assert moved.tolist() == [bool(blocks), True, True, True, True]


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_a_residual_block_adds_two_convolutions_to_what_it_is_given(device, norm):
    block = ResidualBlock(4, 2, StemNorm(norm)).to(device)
    for norms in (layer for layer in block.modules() if isinstance(layer, GlobalBatchNorm)):
        norms.reset_parameters()
    x = torch.randn(8, 4, 5, 6, device=device)
    branch = functional.conv2d(x, block.first.conv.weight, block.first.conv.bias, padding=1)
    branch = functional.batch_norm(branch, None, None, training=True) if norm == "batch" else branch
    branch = functional.conv2d(branch.relu(), block.second.conv.weight, block.second.conv.bias, padding=1)
    branch = functional.batch_norm(branch, None, None, training=True) if norm == "batch" else branch
    torch.testing.assert_close(block(x, True), (x + branch).relu())
    assert (block.first.conv.bias is None) is (norm == "batch")


@pytest.mark.parametrize("blocks", [(), (1,)])
@pytest.mark.parametrize("stem", ["conv", "overlap"])
def test_batch_norm_of_a_stem_follows_whole_images(device, stem, blocks):
    described = {"image_size": (8, 8), "patch_size": (4, 4), "embed_dim": 16, "depth": 1, "num_heads": 2}
    described |= {"stem_channels": (4,), "stem_blocks": blocks}
    encoder = EncoderConfig(**described, stem=stem, stem_norm="batch").build(device=device)
    images = 3 + 2 * torch.randn(64, 3, 8, 8, device=device)
    for _ in range(120):
        training = encoder.train()(images)
    torch.testing.assert_close(encoder.eval()(images), training, atol=5e-3, rtol=5e-3)
    norms = [layer for layer in encoder.stem.modules() if isinstance(layer, GlobalBatchNorm)]
    assert len(norms) == (stem == "overlap") + 1 + 2 * len(blocks)
    before = [norm.running_mean.clone() for norm in norms]
    encoder.train()(images, torch.tensor([[0, 3]], device=device).expand(64, -1))
    for norm, mean in zip(norms, before, strict=True):
        assert torch.equal(mean, norm.running_mean) is (stem == "overlap")


def test_batch_norm_that_no_whole_image_would_feed_is_refused():
    encoder = EncoderConfig(image_size=(32, 32), patch_size=(8, 8), stem="overlap", stem_norm="batch")
    with pytest.raises(ValueError, match="no whole image"):
        HJEPAConfig(encoder=encoder)
    with pytest.raises(ValueError, match="no convolutions"):
        EncoderConfig(stem_norm="batch")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"stem": "overlap", "stem_blocks": (1,)}, "one count of blocks for each"),
        ({"stem": "conv", "stem_blocks": (1, -1)}, "one count of blocks for each"),
        ({"stem": "conv", "stem_blocks": (1, 0.5)}, "one count of blocks for each"),
        ({"stem_blocks": (1, 1)}, "stem=linear has no convolutions; allowed: \\(\\)"),
    ],
)
def test_counts_of_blocks_that_no_stem_has_are_refused(fields, reason):
    with pytest.raises(ValueError, match=reason):
        EncoderConfig(**fields)


def test_blocks_stand_behind_the_stages_that_name_them():
    config = EncoderConfig(image_size=(32, 32), patch_size=(8, 8), stem="overlap", stem_blocks=[2, 0])
    kinds = [type(stage).__name__ for stage in config.build().stem.stages]
    assert kinds == ["Stage", "ResidualBlock", "ResidualBlock", "Stage", "Stage"]
