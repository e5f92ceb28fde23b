import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from hjepa_models import (
    EncoderConfig,
    GlobalConfig,
    HJEPAConfig,
    LevelWeightsConfig,
    PredictorConfig,
    PyramidConfig,
    load_pretrained,
    save_pretrained,
)
from hjepa_models.pretrained import config_from_dict


def small(**fields):
    return HJEPAConfig(
        encoder=EncoderConfig(
            image_size=(8, 8), patch_size=(4, 4), embed_dim=16, depth=1, num_heads=2, layer_scale=0.1
        ),
        predictor=PredictorConfig(depth=1, embed_dim=16, num_heads=2),
        pyramid=PyramidConfig(levels=2, fpn="add", fpn_dim=8),
        level_weights=LevelWeightsConfig(kind="curriculum", weights=(1.0, 0.5), ramp_steps=7),
        **fields,
    )


@pytest.fixture
def folder(tmp_path):
    save_pretrained(small(global_level=GlobalConfig(hidden_dim=8, out_dim=4)).build(seed=4), tmp_path / "model")
    return tmp_path / "model"


def test_round_trip_is_exact(folder, device):
    model = small(global_level=GlobalConfig(hidden_dim=8, out_dim=4)).build(seed=4, device=device).eval()
    loaded = load_pretrained(folder, device)
    assert loaded.config == model.config
    assert not loaded.training
    images = torch.randn(2, 3, 8, 8, device=device)
    for level in model.feature_levels:
        assert torch.equal(loaded.features(images, level), model.features(images, level))
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_configs_survive_json():
    config = small(global_level=None, targets="detached")
    assert config_from_dict(HJEPAConfig, json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_other_keys_are_listed_in_one_line(folder):
    path = folder / "model.safetensors"
    state = load_file(path)
    state["stray"] = state.pop("predictor.mask_token")
    state["encoder.stem.proj.bias"] = torch.zeros(3)
    save_file(state, path)
    with pytest.raises(
        ValueError, match=r"missing: predictor\.mask_token; unexpected: stray; other shapes: encoder"
    ) as e:
        load_pretrained(folder)
    assert "\n" not in str(e.value)


def test_damage_is_one_clear_line(folder, tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_pretrained(tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match="damaged"):
        load_pretrained(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        load_pretrained(folder)
    (folder / "config.json").write_text("[]")
    weights.unlink()
    with pytest.raises(ValueError, match=r"no model.safetensors"):
        load_pretrained(folder)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("encoder", "dept"), 3, "config.encoder.dept: no field.*did you mean 'depth'"),
        (("encoder",), 3, "config.encoder=3: not a mapping"),
        (("predictor", "num_heads"), 5, "predictor.num_heads=5"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(folder, path, value, message):
    content = json.loads((folder / "config.json").read_text())
    place = content["config"]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        load_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model": "other"}))
    with pytest.raises(ValueError, match="not the config of an HJEPA"):
        load_pretrained(folder)
