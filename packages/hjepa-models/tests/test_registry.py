import pytest

from hjepa_models import encoder_config, list_models

MILLIONS = {"tiny": 5.5, "small": 21.7, "base": 85.8, "large": 303.3, "huge": 630.8}


@pytest.mark.parametrize(("size", "millions"), MILLIONS.items())
def test_sizes_have_the_known_number_of_parameters(size, millions):
    encoder = encoder_config(f"vit_{size}_patch16").build(device="meta")
    assert sum(p.numel() for p in encoder.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)


@pytest.mark.parametrize("name", list_models())
def test_every_listed_name_builds(name):
    encoder = encoder_config(name).build(device="meta")
    assert f"_patch{encoder.config.patch_size[0]}" in name


def test_any_patch_and_overrides():
    config = encoder_config("vit_nano_patch7", image_size=(28, 28), depth=2)
    assert (config.grid, config.depth, config.embed_dim) == ((4, 4), 2, 128)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_smal_patch16", "did you mean 'vit_small_patch16'"),
        ("resnet50", "allowed: vit_"),
        ("vit_base_patch0", "vit_"),
    ],
)
def test_unknown_names_suggest_the_nearest(name, message):
    with pytest.raises(ValueError, match=message):
        encoder_config(name)


def test_unknown_fields_suggest_the_nearest():
    with pytest.raises(ValueError, match=r"dept: no field.*did you mean 'depth'"):
        encoder_config("vit_nano_patch4", dept=3)
