import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hjepa_models import EncoderConfig, MlpKind, Position, Stem
from hjepa_models.grid import gather_tokens

SMALL = {"image_size": (16, 24), "patch_size": (4, 4), "embed_dim": 32, "depth": 2, "num_heads": 2}


@pytest.mark.parametrize("position", list(Position))
@pytest.mark.parametrize("stem", list(Stem))
@pytest.mark.parametrize("registers", [0, 3])
def test_no_index_equals_an_index_of_everything(device, position, stem, registers):
    encoder = EncoderConfig(**SMALL, position=position, stem=stem, registers=registers).build(device=device)
    images = torch.randn(2, 3, 16, 24, device=device)
    everything = torch.arange(24, device=device).expand(2, -1)
    whole = encoder(images)
    assert whole.shape == (2, 24, 32)
    torch.testing.assert_close(encoder(images, everything), whole, atol=1e-5, rtol=1e-5)
    order = torch.randperm(24, device=device).expand(2, -1)
    torch.testing.assert_close(encoder(images, order), gather_tokens(whole, order), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stem", list(Stem))
def test_a_hidden_patch_changes_nothing(device, stem):
    encoder = EncoderConfig(**SMALL, stem=stem).build(device=device)
    images = torch.randn(1, 3, 16, 24, device=device)
    index = torch.arange(12, device=device).unsqueeze(0)
    before = encoder(images, index)
    images[:, :, 8:] = float("nan")
    assert torch.equal(encoder(images, index), before)


@pytest.mark.parametrize("position", list(Position))
def test_position_matters(device, position):
    encoder = EncoderConfig(**SMALL, position=position, init_std=0.2).build(device=device)
    images = torch.randn(1, 3, 4, 4, device=device).tile(1, 1, 4, 6)
    images[:, :, :4, :4] = 0
    tokens = encoder(images)[0]
    assert (tokens[1] - tokens[20]).abs().max() > 1e-3  # equal patches, other places


@pytest.mark.parametrize(
    ("size", "patch", "position"),
    [((32,), (4,), "rope"), ((4, 8, 8), (2, 4, 4), "rope"), ((4, 8, 8), (2, 4, 4), "sincos")],
)
def test_any_number_of_axes(device, size, patch, position):
    config = EncoderConfig(
        image_size=size, patch_size=patch, embed_dim=48, depth=1, num_heads=2, position=position, in_channels=2
    )
    encoder = config.build(device=device)
    assert encoder(torch.randn(2, 2, *size, device=device)).shape == (2, config.num_patches, 48)
    assert encoder.patchify(torch.randn(2, 2, *size, device=device)).shape[1] == config.num_patches


@pytest.mark.parametrize("position", list(Position))
def test_another_resolution_is_encoded(device, position):
    encoder = EncoderConfig(**SMALL, position=position).build(device=device)
    assert encoder(torch.randn(1, 3, 32, 20, device=device)).shape == (1, 40, 32)


@pytest.mark.parametrize("mlp", list(MlpKind))
def test_bf16_is_finite_and_gradients_reach_everything(device, mlp):
    config = EncoderConfig(
        **SMALL, mlp=mlp, registers=2, layer_scale=1e-5, drop_path=0.1, qk_norm=True, stem="conv", attention="explicit"
    )
    encoder = config.build(device=device)
    with torch.autocast(device.type, torch.bfloat16):
        tokens = encoder(torch.randn(8, 3, 16, 24, device=device))
    tokens.float().square().mean().backward()
    assert tokens.isfinite().all()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@given(st.integers(1, 64), st.integers(1, 17))
def test_image_size_is_accepted_exactly_when_the_patch_divides_it(size, patch):
    try:
        config = EncoderConfig(image_size=(size, size), patch_size=(patch, patch), embed_dim=8, num_heads=1)
    except ValueError:
        assert size % patch
    else:
        assert config.grid == (size // patch, size // patch)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": (30, 32)}, "axis 0 has 30 pixels.*nearest 28 or 32"),
        ({"image_size": (32,)}, "1 axes where patch_size"),
        ({"num_heads": 5}, "does not divide embed_dim=32; allowed: 1, 2, 4"),
        ({"embed_dim": 10**15 + 37, "num_heads": 2}, "allowed: 1; change"),
        ({"mlp_ratio": float("inf")}, "mlp_ratio=inf: must be above 0; allowed: > 0 and finite"),
        ({"mlp": "swigglu"}, "did you mean 'swiglu'"),
        ({"drop_path": 1.0}, "allowed: 0 to below 1"),
        ({"depth": 0}, "depth=0"),
        ({"num_heads": 16}, "too narrow"),
        ({"stem": "conv", "image_size": (4,) * 4, "patch_size": (2,) * 4, "position": "sincos"}, "use stem=linear"),
        ({"image_size": ()}, "one positive size per axis"),
        ({"image_size": 16}, r"image_size=16: no sequence; allowed: e.g. \(16, 16\)"),
        ({"image_size": (16.0, 24.0)}, "one positive size per axis, an integer"),
        ({"output_patch_size": 2}, "output_patch_size=2: no sequence"),
        ({"mlp_ratio": 0.01}, "encoder.mlp_ratio=0.01: leaves no hidden unit of mlp at embed_dim=32"),
        ({"mlp_ratio": 0.04, "mlp": "swiglu"}, "encoder.mlp_ratio=0.04: leaves no hidden unit of swiglu"),
    ],
)
def test_bad_configs_say_why_in_one_line(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        EncoderConfig(**(SMALL | fields))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("shape", [(1, 3, 16, 23), (1, 1, 16, 24), (1, 3, 16)])
def test_images_that_do_not_fit_are_refused(device, shape):
    encoder = EncoderConfig(**SMALL).build(device=device)
    with pytest.raises(ValueError, match="images"):
        encoder(torch.zeros(shape, device=device))


def test_lists_become_tuples():
    config = EncoderConfig(image_size=[16, 16], patch_size=[4, 4], stem_channels=[8])
    assert config.image_size == (16, 16)
    assert config.stem_channels == (8,)
