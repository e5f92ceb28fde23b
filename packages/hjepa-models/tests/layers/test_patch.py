import itertools

import pytest
import torch

from hjepa_models.layers.patch import ConvStem, LinearStem, patchify, stage_strides


@pytest.mark.parametrize(("sizes", "patch"), [((12,), (3,)), ((8, 6), (4, 2)), ((4, 6, 4), (2, 3, 4))])
def test_patches_are_cut_row_major(device, sizes, patch):
    images = torch.randn(2, 3, *sizes, device=device)
    patches = patchify(images, patch)
    cells = itertools.product(*(range(size // p) for size, p in zip(sizes, patch, strict=True)))
    for number, cell in enumerate(cells):
        window = tuple(slice(c * p, (c + 1) * p) for c, p in zip(cell, patch, strict=True))
        assert torch.equal(patches[:, number], images[(slice(None), slice(None), *window)].flatten(1))


@pytest.mark.parametrize("patch", [(8,), (4, 4), (2, 4, 4), (7, 7), (1, 2)])
def test_conv_stem_sees_nothing_across_a_patch(device, patch):
    stem = ConvStem(3, patch, 16, (4, 8)).to(device)
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
