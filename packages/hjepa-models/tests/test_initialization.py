import pytest
import torch

from hjepa_models import (
    EncoderConfig,
    Fpn,
    GlobalConfig,
    HJEPAConfig,
    LevelWeightsConfig,
    PredictorConfig,
    PyramidConfig,
)


def config(**encoder):
    sizes = {"image_size": (32, 32), "patch_size": (8, 8), "embed_dim": 64, "depth": 4, "num_heads": 4}
    return HJEPAConfig(
        encoder=EncoderConfig(**(sizes | encoder)),
        predictor=PredictorConfig(depth=1, embed_dim=32, num_heads=2),
        pyramid=PyramidConfig(levels=2, pooling="learned", fpn=Fpn.concat, fpn_dim=32),
        level_weights=LevelWeightsConfig(weights=(1.0, 0.7)),
        global_level=GlobalConfig(hidden_dim=32, out_dim=16),
    )


def test_building_leaves_the_global_generator_alone_and_follows_the_seed(device):
    before = torch.random.get_rng_state()
    first, again, other = (config().build(seed=seed, device=device) for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.encoder.stem.proj.weight, other.encoder.stem.proj.weight)


@pytest.mark.parametrize("stem", ["linear", "conv"])
def test_meta_build_then_init_equals_a_direct_build(device, stem):
    described = config(stem=stem, registers=2, layer_scale=0.1, mlp="swiglu", qk_norm=True)
    model = described.build(device="meta")
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device=device)
    model.init_weights(torch.Generator().manual_seed(3))
    direct = described.build(seed=3, device=device)
    state = model.state_dict()
    for key, value in direct.state_dict().items():
        assert torch.equal(state[key], value), key


def test_scales_of_the_first_values(device):
    encoder = config(embed_dim=256, depth=4).encoder.build(device=device)
    encoder.requires_grad_(False)
    blocks = encoder.transformer.blocks
    assert float(blocks[0].attn.qkv.weight.std()) == pytest.approx(0.0176, rel=0.05)  # 0.02 cut at two deviations
    for number, block in enumerate(blocks, start=1):
        for layer in (block.attn.proj, block.mlp.fc2):
            assert float(layer.weight.std()) == pytest.approx(0.0176 / (2 * number) ** 0.5, rel=0.05)
    assert float(encoder.stem.proj.weight.std()) == pytest.approx(0.88 * 192**-0.5, rel=0.05)
    assert all(not m.bias.any() for m in encoder.modules() if isinstance(m, torch.nn.Linear))
