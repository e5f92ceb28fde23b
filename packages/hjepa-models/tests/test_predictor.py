import pytest
import torch

from hjepa_models import EncoderConfig, Position, PredictorConfig, PredictorMode

ENCODER = {"image_size": (16, 16), "patch_size": (4, 4), "embed_dim": 32, "depth": 1, "num_heads": 2}


def build(device, mode, **encoder):
    return PredictorConfig(depth=2, embed_dim=24, num_heads=2, mode=mode).build(
        EncoderConfig(**(ENCODER | encoder)), device=device
    )


def inputs(device, blocks=3, count=4):
    context = torch.randn(2, 5, 32, device=device)
    order = torch.stack([torch.randperm(16) for _ in range(2)]).to(device)
    targets = torch.randint(0, 16, (2, blocks, count), device=device)
    return context, order[:, :5], targets


@pytest.mark.parametrize("mode", list(PredictorMode))
@pytest.mark.parametrize("position", list(Position))
def test_shapes_and_gradients(device, mode, position):
    predictor = build(device, mode, position=position)
    context, context_index, target_index = inputs(device)
    context.requires_grad_()
    out = predictor(context, context_index, target_index)
    assert out.shape == (2, 3, 4, 32)
    out.square().sum().backward()
    assert context.grad.abs().sum() > 0
    assert all(p.grad is not None for p in predictor.parameters())


def test_one_block_is_the_same_in_both_modes(device):
    joint, per_block = build(device, "joint"), build(device, "per_block")
    context, context_index, target_index = inputs(device, blocks=1)
    torch.testing.assert_close(
        joint(context, context_index, target_index), per_block(context, context_index, target_index)
    )


def test_per_block_predictions_do_not_see_other_blocks(device):
    per_block = build(device, "per_block")
    context, context_index, target_index = inputs(device)
    together = per_block(context, context_index, target_index)
    alone = per_block(context, context_index, target_index[:, 1:2])
    torch.testing.assert_close(together[:, 1:2], alone, atol=1e-5, rtol=1e-5)


def test_joint_predictions_of_a_repeated_position_are_equal(device):
    joint = build(device, "joint")
    context, context_index, _ = inputs(device)
    target_index = torch.tensor([[[3, 4], [4, 9]]] * 2, device=device)
    out = joint(context, context_index, target_index)
    torch.testing.assert_close(out[:, 0, 1], out[:, 1, 0])


@pytest.mark.parametrize("position", list(Position))
def test_predictions_follow_positions_and_ignore_the_order_of_the_context(device, position):
    predictor = build(device, "joint", position=position)
    context, context_index, target_index = inputs(device)
    out = predictor(context, context_index, target_index)
    order = torch.randperm(5, device=device)
    torch.testing.assert_close(
        predictor(context[:, order], context_index[:, order], target_index), out, atol=1e-5, rtol=1e-4
    )
    assert (predictor(context, context_index, (target_index + 1) % 16) - out).abs().max() > 1e-5


def test_bad_configs():
    with pytest.raises(ValueError, match=r"predictor\.num_heads=7"):
        PredictorConfig(num_heads=7)
    with pytest.raises(ValueError, match="did you mean 'per_block'"):
        PredictorConfig(mode="per_blok")
