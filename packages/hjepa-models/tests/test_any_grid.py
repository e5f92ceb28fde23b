"""Grids of any number of axes, patch sizes, level counts: a model that a config admits runs on all its levels."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from hjepa_models import (
    EncoderConfig,
    Fpn,
    HJEPAConfig,
    LevelWeightsConfig,
    Pooling,
    Position,
    PredictorConfig,
    PredictorMode,
    PyramidConfig,
    Targets,
    coarsen,
    max_levels,
    num_tokens,
)


@st.composite
def configs(draw):
    axes = draw(st.integers(1, 3))
    grid = tuple(draw(st.lists(st.integers(2, 7 - 2 * axes + 1), min_size=axes, max_size=axes)))
    patch = tuple(draw(st.lists(st.integers(1, 3), min_size=axes, max_size=axes)))
    pooling = draw(st.sampled_from(list(Pooling)))
    levels = draw(st.integers(1, max_levels(grid, pooling)))
    targets = draw(st.sampled_from(list(Targets)))
    return HJEPAConfig(
        encoder=EncoderConfig(
            image_size=tuple(n * p for n, p in zip(grid, patch, strict=True)),
            patch_size=patch,
            in_channels=draw(st.integers(1, 3)),
            embed_dim=24,
            depth=1,
            num_heads=2,
            position=draw(st.sampled_from(list(Position))),
        ),
        predictor=PredictorConfig(depth=1, embed_dim=24, num_heads=2, mode=draw(st.sampled_from(list(PredictorMode)))),
        pyramid=PyramidConfig(
            levels=levels,
            pooling=pooling,
            fpn=draw(st.sampled_from(list(Fpn))),
            fpn_dim=8,
            level_dims=tuple(draw(st.sampled_from([(), range(4, 4 + levels)]))),
        ),
        level_weights=LevelWeightsConfig(weights=(1.0,) * levels),
        targets=targets,
        sigreg_weight=0.1 if targets is Targets.online else 0.0,
    )


@given(configs(), st.integers(0, 1000))
def test_every_level_has_its_loss_and_its_tokens(config, seed):
    model = config.build(seed=seed)
    grid, pooling = config.encoder.grid, config.pyramid.pooling
    count = num_tokens(grid)
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(2, config.encoder.in_channels, *config.encoder.image_size, generator=generator)
    order = torch.stack([torch.randperm(count, generator=generator) for _ in range(2)])
    visible = max(1, count // 3)
    output = model([images], order[:, :visible], order[:, visible:].unsqueeze(1), step=seed)
    output.loss.backward()
    assert output.loss.isfinite()
    assert {str(level) for level in range(config.pyramid.levels)} <= set(output.level_losses)
    for level in range(config.pyramid.levels):
        if pooling is Pooling.sequence:
            tokens = count // 2**level
            assert tokens * 2**level == count  # a sequence that would drop a token is refused
        else:
            tokens = math.prod(coarsen(grid, level))
        assert model.features(images, level, "none").shape == (2, tokens, 24)
