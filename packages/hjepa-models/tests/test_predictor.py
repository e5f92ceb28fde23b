import pytest
import torch

from hjepa_models import EncoderConfig, Position, PredictorConfig, PredictorMode, StateConfig

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


@pytest.mark.parametrize("attention", ["sdpa", "explicit", "flex"])
@pytest.mark.parametrize("mode", ["per_block", "isolated"])
def test_blocks_apart_do_not_see_one_another(device, mode, attention):
    apart = build(device, mode, attention=attention)
    context, context_index, target_index = inputs(device)
    together = apart(context, context_index, target_index)
    alone = apart(context, context_index, target_index[:, 1:2])
    torch.testing.assert_close(together[:, 1:2], alone, atol=1e-5, rtol=1e-5)
    joint = build(device, "joint")
    assert (joint(context, context_index, target_index)[:, 1:2] - alone).abs().max() > 1e-5


def test_isolated_is_per_block_where_the_context_does_not_look_back(device):
    """With one layer the context's own update never reaches the targets, so the two modes are equal."""
    context, context_index, target_index = inputs(device)
    outputs = []
    for mode in ("per_block", "isolated"):
        config = PredictorConfig(depth=1, embed_dim=24, num_heads=2, mode=mode)
        outputs.append(config.build(EncoderConfig(**ENCODER), device=device)(context, context_index, target_index))
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)


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


STATE = StateConfig(recurrent_dim=16, hidden_dim=16, num_groups=4, num_classes=4)


@pytest.mark.parametrize("mode", list(PredictorMode))
def test_a_hybrid_state_conditions_each_block(device, mode):
    config = PredictorConfig(depth=1, embed_dim=24, num_heads=2, mode=mode, state=STATE)
    predictor = config.build(EncoderConfig(**ENCODER), device=device)
    context, context_index, target_index = inputs(device)
    condition, divergence = predictor.rollout(context, target_index, (4, 4), 3, torch.randn(2, 3, 32, device=device))
    assert condition.shape == (2, 3, 24)
    out = predictor(context, context_index, target_index, None, condition)
    (out.square().mean() + divergence.loss).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in predictor.parameters())
    moved = condition.detach().clone()
    moved[:, 2] += torch.randn(24, device=device)
    change = (predictor(context, context_index, target_index, None, moved) - out).abs().amax((0, 2, 3))
    assert change[2] > 1e-4
    if mode is not PredictorMode.joint:
        assert change[:2].max() < 1e-6


def test_the_state_sees_targets_in_training_and_foresees_without_them(device):
    config = PredictorConfig(depth=1, embed_dim=24, num_heads=2, state=STATE)
    predictor = config.build(EncoderConfig(**ENCODER), device=device).eval()
    context, _, target_index = inputs(device)
    targets = torch.randn(2, 3, 32, device=device)
    seen, divergence = predictor.rollout(context, target_index, (4, 4), 0, targets)
    other, _ = predictor.rollout(context, target_index, (4, 4), 0, -5 * targets)
    assert float(divergence.kl) > 0
    assert not torch.equal(seen, other)
    foreseen, nothing = predictor.rollout(context, target_index, (4, 4), 0)
    assert nothing is None
    assert torch.equal(foreseen, predictor.rollout(context, target_index, (4, 4), 1)[0])  # the mode: no noise


def test_rolling_without_a_state_is_refused(device):
    context, _, target_index = inputs(device)
    with pytest.raises(ValueError, match="state=None: the predictor has no hybrid state"):
        build(device, "joint").rollout(context, target_index, (4, 4), 0)


def test_bad_configs():
    with pytest.raises(ValueError, match=r"predictor\.num_heads=7"):
        PredictorConfig(num_heads=7)
    with pytest.raises(ValueError, match="did you mean 'per_block'"):
        PredictorConfig(mode="per_blok")
