import copy
import importlib.util

import pytest
import torch
from torch import nn
from torch.nn import functional

from hjepa_models import EncoderConfig, GlobalConfig, HJEPAConfig, PredictorConfig, Stem, save_pretrained
from hjepa_models import quantization as quantization_module
from hjepa_models.quantization import quantize_int8, weight_bytes

pytest.importorskip("torchao")


def small(**fields):
    encoder = EncoderConfig(
        image_size=(16, 16), patch_size=(4, 4), embed_dim=32, depth=1, num_heads=2, stem_channels=(8,), **fields
    )
    predictor = PredictorConfig(depth=1, embed_dim=16, num_heads=2)
    top = GlobalConfig(hidden_dim=16, out_dim=8)
    return HJEPAConfig(encoder=encoder, predictor=predictor, global_level=top).build(seed=2)


def by_hand(module, quantized):
    """A copy of the module with the weights that the quantised one stands for, as floats."""
    copied = copy.deepcopy(module)
    for child, other in zip(copied.modules(), quantized.modules(), strict=True):
        if isinstance(child, nn.Linear) and hasattr(other.weight, "qdata"):
            child.weight.data = (other.weight.qdata.double() * other.weight.scale.double()).to(child.weight)
    return copied


# In bfloat16 the quotient of weight and step is itself rounded, to a half where it is largest.
@pytest.mark.parametrize(("dtype", "off", "tolerance"), [(torch.float32, 0.5001, 1e-5), (torch.bfloat16, 1.0, 2e-2)])
def test_one_map_is_the_formula(dtype, off, tolerance, device):
    linear = nn.Linear(40, 24).to(device, dtype)
    linear.weight.data[3] *= 100
    quantized = quantize_int8(linear)
    weight = linear.weight.detach().double()
    step = weight.abs().amax(dim=1, keepdim=True) / 127.5  # each row has its own
    stored = quantized.weight.qdata
    assert stored.dtype is torch.int8
    # Nearest to the weight; the largest of a row lies between two integers and may go to either.
    assert ((stored.double() * step - weight).abs() <= off * step).all()
    images = torch.randn(5, 40, device=device, dtype=dtype)
    expected = images.double() @ (stored.double() * step).T + linear.bias.double()
    torch.testing.assert_close(quantized(images).double(), expected, atol=tolerance, rtol=tolerance)
    assert quantized(images).dtype is dtype
    assert not torch.equal(quantized(images), linear(images))


@pytest.mark.parametrize("stem", list(Stem))
def test_features_are_those_of_the_rounded_weights_at_every_level(stem, device):
    model = small(stem=stem).to(device)
    quantized = quantize_int8(model)
    images = torch.randn(3, 3, 16, 16, device=device)
    expected, exact = by_hand(model, quantized).all_features(images), model.all_features(images)
    for level, found in quantized.all_features(images).items():
        torch.testing.assert_close(found, expected[level], atol=1e-4, rtol=1e-4)
        assert not torch.equal(found, exact[level])
        assert functional.cosine_similarity(found, exact[level]).min() > 0.99


def test_the_original_is_unchanged_and_the_copy_keeps_its_modes(device):
    model = small(stem="conv").to(device)
    model.encoder.eval()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    quantized = quantize_int8(model)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(type(value) is nn.Parameter for value in model.parameters())
    assert [module.training for module in quantized.modules()] == [module.training for module in model.modules()]
    # Only linear maps: convolutions, norms and biases stay as they are.
    changed = {key for key, value in quantized.state_dict().items() if type(value) is not torch.Tensor}
    assert changed == {f"{name}.weight" for name, child in model.named_modules() if isinstance(child, nn.Linear)}
    assert {"encoder.stem.proj.weight", "target_encoder.stem.proj.weight", "pyramid.projection.1.weight"} <= changed
    assert "encoder.stem.stages.0.conv.weight" in state


def test_weights_that_are_resized_stay_floats(device):
    model = small(stem="flexi", processing_patch_size=(8, 8), output_patch_size=(4, 4), upsampling="learned").to(device)
    quantized = quantize_int8(model)
    assert type(quantized.encoder.stem.proj.weight) is nn.Parameter
    assert type(quantized.encoder.transformer.blocks[0].mlp.fc1.weight) is not nn.Parameter
    images = torch.randn(2, 3, 16, 16, device=device)
    torch.testing.assert_close(
        quantized.features(images, 0), by_hand(model, quantized).features(images, 0), atol=1e-4, rtol=1e-4
    )


def test_bytes_are_counted(device):
    model = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Linear(32, 8, bias=False)).to(device)
    norm = 4 * (4 * 32) + 8
    assert weight_bytes(model) == 4 * (64 * 32 + 32) + norm + 4 * 32 * 8
    # A row of the weight keeps a scale (4 bytes) and a zero point (1 byte).
    assert weight_bytes(quantize_int8(model)) == (64 * 32 + 5 * 32 + 4 * 32) + norm + (32 * 8 + 5 * 8)
    assert weight_bytes(model[0].half()) == 2 * (64 * 32 + 32)


def test_an_encoder_can_be_quantized_alone(device):
    encoder = EncoderConfig(image_size=(8, 8), patch_size=(4, 4), embed_dim=16, depth=1, num_heads=2).build().to(device)
    images = torch.randn(2, 3, 8, 8, device=device)
    quantized = quantize_int8(encoder)
    with torch.no_grad():
        torch.testing.assert_close(quantized(images), by_hand(encoder, quantized)(images), atol=1e-4, rtol=1e-4)


def test_what_cannot_be_quantized_is_one_line(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="module=LayerNorm: has no linear map"):
        quantize_int8(nn.LayerNorm(4))
    quantized = quantize_int8(small())
    with pytest.raises(ValueError, match=r"module=HJEPA: has no linear map in floating point.*quantise the original"):
        quantize_int8(quantized)
    with pytest.raises(ValueError, match="take the model before it is quantised"):
        save_pretrained(quantized, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    found = importlib.util.find_spec
    monkeypatch.setattr(quantization_module, "find_spec", lambda name: None if name == "torchao" else found(name))
    with pytest.raises(ValueError, match=r"'torchao': not installed.*hjepa-models\[int8\]"):
        quantize_int8(nn.Linear(4, 4))
