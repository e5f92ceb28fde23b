import pytest
import torch
from timm.layers import DropPath, LayerScale

from hjepa_models.encoder import EncoderConfig
from hjepa_models.layers import block as block_module
from hjepa_models.layers.attention import AttentionBackend
from hjepa_models.layers.block import Block, DropPathSchedule, MlpKind, Transformer, build_mlp, feed_forward

OPTIONS = {"mlp": MlpKind.mlp, "mlp_ratio": 4.0, "qk_norm": False, "attention": AttentionBackend.sdpa}


def test_swiglu_has_as_many_parameters_as_the_mlp():
    counts = [sum(p.numel() for p in build_mlp(kind, 192, 4.0).parameters()) for kind in MlpKind]
    assert counts[1] == pytest.approx(counts[0], rel=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_product_that_ends_in_gelu_is_the_plain_layer(device, monkeypatch, dtype):
    """Where there is no GPU the same path runs on the CPU, whose product ends in the exact GELU."""
    mlp, x = build_mlp(MlpKind.mlp, 32, 4.0).to(device), torch.randn(3, 5, 32, device=device)
    calls = []
    mlp.act.register_forward_hook(lambda *_: calls.append(1))
    if device.type == "cpu":
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    for grad, used in ((False, dtype is torch.bfloat16), (True, False)):
        calls.clear()
        with torch.set_grad_enabled(grad), torch.autocast(device.type, dtype, enabled=dtype is torch.bfloat16):
            fused = feed_forward(mlp, x)
            assert bool(calls) != used
            torch.testing.assert_close(fused, mlp(x), atol=0.02, rtol=0.02)
        assert fused.requires_grad is grad


def test_other_feed_forward_layers_stay_as_they_are(device, monkeypatch):
    if device.type == "cpu":
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    x = torch.randn(2, 3, 32, device=device, dtype=torch.bfloat16)
    swiglu, packed = build_mlp(MlpKind.swiglu, 32, 4.0), build_mlp(MlpKind.mlp, 32, 4.0)
    packed.fc1.weight = torch.nn.Parameter(torch.ones(128, 32, dtype=torch.int8), requires_grad=False)
    packed.fc1.weight.__class__ = type("Packed", (torch.nn.Parameter,), {})
    with torch.no_grad():
        assert not any(block_module._ends_in_gelu(mlp, x, torch.bfloat16) for mlp in (swiglu, packed))
        assert block_module._ends_in_gelu(build_mlp(MlpKind.mlp, 32, 4.0), x, torch.bfloat16)


def test_layer_scale_does_not_switch_drop_path_off(device):
    block = Block(16, 2, layer_scale=1e-5, drop_path=0.5, **OPTIONS).to(device)
    assert isinstance(block.drop1, DropPath)
    assert isinstance(block.scale1, LayerScale)
    torch.nn.init.ones_(block.scale1.gamma)
    x = torch.randn(64, 3, 16, device=device)
    kept = (block(x) != x).flatten(1).any(1)
    assert 0 < kept.sum() < 64
    block.eval()
    assert (block(x) != x).flatten(1).any(1).all()


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [(DropPathSchedule.linear, [0.0, 0.05, 0.1, 0.15, 0.2]), (DropPathSchedule.constant, [0.2] * 5)],
)
def test_drop_path_follows_its_schedule(schedule, expected):
    options = {"layer_scale": None, "drop_path": 0.2, "activation_checkpointing": False, "drop_path_schedule": schedule}
    stack = Transformer(16, 5, 2, **options, **OPTIONS)
    rates = [block.drop1.drop_prob if isinstance(block.drop1, DropPath) else 0.0 for block in stack.blocks]
    assert rates == pytest.approx(expected)
    assert [block.drop2.drop_prob for block in stack.blocks[1:]] == pytest.approx(expected[1:])
    single = Transformer(16, 1, 2, **options, **OPTIONS)  # the only block is the last one
    assert single.blocks[0].drop1.drop_prob == pytest.approx(0.2)


@pytest.mark.parametrize("position", ["rope", "rope_mixed", "relative"])
def test_checkpointing_gives_identical_gradients(device, position):
    images = torch.randn(2, 3, 16, 16, device=device)
    gradients = []
    for checkpointing in (False, True):
        config = EncoderConfig(
            image_size=(16, 16),
            patch_size=(4, 4),
            embed_dim=32,
            depth=3,
            num_heads=2,
            registers=1,
            position=position,
            drop_path=0.2,
            activation_checkpointing=checkpointing,
        )
        encoder = config.build(seed=1, device=device)
        torch.manual_seed(3)  # of the dropped paths
        encoder(images).square().mean().backward()
        gradients.append([p.grad for p in encoder.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
