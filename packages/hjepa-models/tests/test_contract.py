"""What every encoder of the registry promises, at its true width and with one block."""

import dataclasses

import pytest
import torch

from hjepa_models import (
    HJEPAConfig,
    PredictorConfig,
    PyramidConfig,
    coarsen,
    encoder_config,
    list_models,
    load_pretrained,
    save_pretrained,
)
from hjepa_models.registry import LISTED_PATCHES, SIZES

NAMES = [f"vit_{size}_patch16" for size in SIZES] + [
    f"vit_nano_patch{patch}" for patch in LISTED_PATCHES if patch != 16
]
SLOW = ("large", "huge", "giant")


def config_of(name, targets="detached", **encoder):
    patch = int(name.rpartition("patch")[2])
    size = {"image_size": (4 * patch, 3 * patch), "depth": 1}
    return HJEPAConfig(
        encoder=encoder_config(name, **(size | encoder)),
        predictor=PredictorConfig(depth=1, embed_dim=48, num_heads=2),
        pyramid=PyramidConfig(levels=3, fpn="concat", fpn_dim=32),
        targets=targets,
    )


def batch(config, device, size=3):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(size, 3, *config.encoder.image_size, generator=generator).to(device)
    order = torch.stack([torch.randperm(12, generator=generator) for _ in range(size)]).to(device)
    return [images], order[:, :4], order[:, 4:10].view(size, 2, 3)


def gradients(model, inputs):
    model.zero_grad()
    model(*inputs, step=0).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def test_the_names_cover_the_registry():
    assert {name.split("_")[1] for name in NAMES} == {name.split("_")[1] for name in list_models()}
    assert {name.split("patch")[1] for name in NAMES} == {name.split("patch")[1] for name in list_models()}


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        *(pytest.param(name, "detached", marks=[pytest.mark.slow] * (name.split("_")[1] in SLOW)) for name in NAMES),
        ("vit_nano_patch16", "ema"),
        ("vit_nano_patch16", "projection"),
    ],
)
def test_the_contract(device, name, targets, tmp_path):
    config = config_of(name, targets)
    model = config.build(seed=3, device=device)
    inputs = batch(config, device)

    # Built without storage and filled later it is the same model.
    late = config.build(device="meta")
    assert all(p.is_meta for p in late.parameters())
    late.to_empty(device="cpu").init_weights(torch.Generator().manual_seed(3))
    assert all(
        torch.equal(a, b.cpu()) for a, b in zip(late.state_dict().values(), model.state_dict().values(), strict=True)
    )
    del late

    # Forward and backward are finite in half precision and reach everything that trains.
    with torch.autocast(device.type, torch.bfloat16):
        half = gradients(model, inputs)
    assert all(gradient is not None and gradient.isfinite().all() for gradient in half.values())

    # Recomputing blocks and compiling change neither loss nor gradients.
    exact = gradients(model, inputs)
    again = config_of(name, targets, activation_checkpointing=True).build(seed=3, device=device)
    assert all(torch.equal(gradient, exact[key]) for key, gradient in gradients(again, inputs).items())
    del again
    if "nano" in name:  # the graph is that of every width
        torch._dynamo.reset()
        model.compile_step(backend="aot_eager")
        for key, gradient in gradients(model, inputs).items():
            torch.testing.assert_close(gradient, exact[key], atol=1e-5, rtol=1e-3)

    # Every level has the shape that its grid says, and a saved model is the same model.
    model.eval()
    save_pretrained(model, tmp_path)
    loaded = load_pretrained(tmp_path, device=device)
    assert dataclasses.asdict(loaded.config) == dataclasses.asdict(config)
    for level in model.feature_levels:
        tokens = model.features(inputs[0][0], level, "none")
        grid = coarsen((4, 3), level if isinstance(level, int) else 0)
        assert tokens.shape == (3, grid[0] * grid[1], config.encoder.embed_dim)
        assert torch.equal(loaded.features(inputs[0][0], level, "none"), tokens)
