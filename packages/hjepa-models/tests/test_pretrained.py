import dataclasses
import json
import logging
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hjepa_models import (
    HJEPA,
    Encoder,
    EncoderConfig,
    GlobalConfig,
    HJEPAConfig,
    LevelWeightsConfig,
    PredictorConfig,
    PyramidConfig,
    load_pretrained,
    save_pretrained,
)
from hjepa_models.pretrained import PretrainedMixin, config_from_dict, load_model, load_state


class KeptEncoder(Encoder, PretrainedMixin):
    """A class of a user's own."""


ENCODER = EncoderConfig(
    image_size=(8, 8), patch_size=(4, 4), embed_dim=16, depth=1, num_heads=2, layer_scale=0.1, registers=1
)


def small(**fields):
    return HJEPAConfig(
        encoder=ENCODER,
        predictor=PredictorConfig(depth=1, embed_dim=16, num_heads=2),
        pyramid=PyramidConfig(levels=2, fpn="add", fpn_dim=8),
        level_weights=LevelWeightsConfig(kind="curriculum", weights=(1.0, 0.5), ramp_steps=7),
        **fields,
    )


def changed(model, by=0.5):
    """The model with other weights than it was made with."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by)
    return model


def assert_equal_states(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def rewrite(folder, change):
    """Change the weights of a folder."""
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


@pytest.fixture
def folder(tmp_path):
    model = small(global_level=GlobalConfig(hidden_dim=8, out_dim=4)).build(seed=4)
    save_pretrained(changed(model), tmp_path / "model")
    return tmp_path / "model"


def test_round_trip_is_exact(folder, device):
    model = changed(small(global_level=GlobalConfig(hidden_dim=8, out_dim=4)).build(seed=4)).to(device).eval()
    loaded = load_pretrained(folder, device)
    assert loaded.config == model.config
    assert not loaded.training
    assert_equal_states(loaded, model)
    images = torch.randn(2, 3, 8, 8, device=device)
    for level in model.feature_levels:
        assert torch.equal(loaded.features(images, level), model.features(images, level))
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_an_encoder_is_kept_the_same_way(tmp_path, device):
    encoder = changed(ENCODER.build(seed=1)).to(device)
    save_pretrained(encoder, tmp_path)
    loaded = load_model(Encoder, tmp_path, device)
    assert type(loaded) is Encoder
    assert loaded.config == ENCODER
    assert_equal_states(loaded, encoder)
    with pytest.raises(
        ValueError, match=r"config.json: model='Encoder': not a config of HJEPA; allowed: model='HJEPA'"
    ):
        load_pretrained(tmp_path)


def test_configs_survive_json():
    config = small(global_level=None, targets="detached")
    assert config_from_dict(HJEPAConfig, json.loads(json.dumps(dataclasses.asdict(config)))) == config


# As it was written by version 0.1.0, shortened to a few fields: those that are missing take their defaults.
GOLDEN = """{
  "model": "HJEPA",
  "config": {
    "encoder": {
      "image_size": [8, 8],
      "patch_size": [4, 4],
      "in_channels": 3,
      "embed_dim": 16,
      "depth": 1,
      "num_heads": 2,
      "mlp_ratio": 2.0,
      "mlp": "swiglu",
      "position": "sincos",
      "layer_scale": 0.1,
      "registers": 2,
      "stem": "conv",
      "stem_channels": [4]
    },
    "predictor": {"embed_dim": 16, "depth": 1, "num_heads": 2, "mode": "per_block"},
    "pyramid": {"levels": 2, "pooling": "sequence", "fpn": "concat", "fpn_dim": 8},
    "targets": "pooled",
    "objective": "l1",
    "level_weights": {"kind": "fixed", "weights": [1.0, 0.5]},
    "global_level": {"hidden_dim": 8, "out_dim": 4, "norm": "layer"}
  }
}
"""


def test_a_stored_config_is_read_and_what_it_does_not_say_takes_defaults(tmp_path):
    expected = HJEPAConfig(
        encoder=EncoderConfig(
            image_size=(8, 8),
            patch_size=(4, 4),
            embed_dim=16,
            depth=1,
            num_heads=2,
            mlp_ratio=2.0,
            mlp="swiglu",
            position="sincos",
            layer_scale=0.1,
            registers=2,
            stem="conv",
            stem_channels=(4,),
        ),
        predictor=PredictorConfig(embed_dim=16, depth=1, num_heads=2, mode="per_block"),
        pyramid=PyramidConfig(levels=2, pooling="sequence", fpn="concat", fpn_dim=8),
        targets="pooled",
        objective="l1",
        level_weights=LevelWeightsConfig(kind="fixed", weights=(1.0, 0.5)),
        global_level=GlobalConfig(hidden_dim=8, out_dim=4, norm="layer"),
    )
    model = changed(expected.build(seed=3))
    save_pretrained(model, tmp_path)
    (tmp_path / "config.json").write_text(GOLDEN)
    loaded = load_pretrained(tmp_path)
    assert loaded.config == expected
    assert_equal_states(loaded, model)


# The weights of an encoder as version 0.1.0 named them.
GOLDEN_KEYS = {
    "registers": (1, 1, 16),
    "stem.proj.weight": (16, 48),
    "stem.proj.bias": (16,),
    "transformer.blocks.0.norm1.weight": (16,),
    "transformer.blocks.0.norm1.bias": (16,),
    "transformer.blocks.0.attn.qkv.weight": (48, 16),
    "transformer.blocks.0.attn.qkv.bias": (48,),
    "transformer.blocks.0.attn.proj.weight": (16, 16),
    "transformer.blocks.0.attn.proj.bias": (16,),
    "transformer.blocks.0.scale1.gamma": (16,),
    "transformer.blocks.0.norm2.weight": (16,),
    "transformer.blocks.0.norm2.bias": (16,),
    "transformer.blocks.0.mlp.fc1.weight": (64, 16),
    "transformer.blocks.0.mlp.fc1.bias": (64,),
    "transformer.blocks.0.mlp.fc2.weight": (16, 64),
    "transformer.blocks.0.mlp.fc2.bias": (16,),
    "transformer.blocks.0.scale2.gamma": (16,),
    "transformer.norm.weight": (16,),
    "transformer.norm.bias": (16,),
}


def test_weights_keep_their_names_and_shapes():
    assert {key: tuple(value.shape) for key, value in ENCODER.build().state_dict().items()} == GOLDEN_KEYS


def test_other_keys_are_listed_in_one_line(folder):
    def change(state):
        state["stray"] = state.pop("predictor.mask_token")
        state["encoder.stem.proj.bias"] = torch.zeros(3)

    rewrite(folder, change)
    with pytest.raises(
        ValueError,
        match=r"missing: predictor\.mask_token; unexpected: stray; "
        r"other shapes: encoder\.stem\.proj\.bias \(3,\) for \(16,\)",
    ) as e:
        load_pretrained(folder)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("change", "listed"),
    [
        (lambda state: state.pop("predictor.norm.bias", None) or state.pop("predictor.mask_token"), "missing"),
        (lambda state: state.update({"predictor.stray": torch.zeros(2)}), "unexpected"),
        (lambda state: state.update({"predictor.mask_token": torch.zeros(2)}), "other shapes"),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_each_kind_of_difference_is_refused_until_it_is_named(folder, change, listed, caplog):
    rewrite(folder, change)
    for allow in ((), ("encoder.*", "pyramid.*")):
        with pytest.raises(ValueError, match=rf"{listed}: predictor\."):
            load_pretrained(folder, allow=allow)
    with caplog.at_level(logging.INFO, "hjepa_models"):
        load_pretrained(folder, allow=["predictor.*"])
    (record,) = caplog.records
    assert f"{listed}: predictor." in record.getMessage()
    assert str(folder) in record.getMessage()
    assert "\n" not in record.getMessage()


def test_what_is_allowed_keeps_its_first_value_and_the_rest_is_loaded(folder):
    saved = load_pretrained(folder).state_dict()

    def change(state):
        del state["predictor.mask_token"]
        state["encoder.stem.proj.bias"] = torch.zeros(3)
        state["head.weight"] = torch.zeros(3)

    rewrite(folder, change)
    loaded = load_pretrained(folder, allow=("predictor.*", "encoder.stem.*", "head.*"))
    fresh = loaded.config.build(seed=0).state_dict()
    for key, value in loaded.state_dict().items():
        kept = key in ("predictor.mask_token", "encoder.stem.proj.bias")
        assert torch.equal(value, (fresh if kept else saved)[key]), key
    assert not torch.equal(fresh["predictor.mask_token"], saved["predictor.mask_token"])


def test_only_differences_that_are_named_pass(folder):
    def change(state):
        del state["predictor.mask_token"]
        del state["encoder.stem.proj.bias"]

    rewrite(folder, change)
    with pytest.raises(ValueError, match=r"missing: encoder\.stem\.proj\.bias; unexpected: none; other shapes: none"):
        load_pretrained(folder, allow=["predictor.*"])


def test_patterns_that_match_nothing_are_refused_as_misspelt(folder):
    with pytest.raises(
        ValueError,
        match=r"allow='predictr.\*': matches no key.*allowed: patterns of keys that begin with encoder, "
        r"global_level, .*did you mean 'predictor'",
    ):
        load_pretrained(folder, allow=["predictr.*"])
    # A pattern of keys that fit is no mistake, and one pattern may be given without a list.
    load_pretrained(folder, allow=["predictor.*"])
    load_pretrained(folder, allow="predictor.*")


@pytest.mark.parametrize(
    ("pattern", "left"), [("*.weight", "0.bias, 1.bias"), ("1.*", "0.bias, 0.weight"), ("?.b??s", "0.weight, 1.weight")]
)
def test_a_pattern_names_whole_keys(pattern, left):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(ValueError, match=f"missing: {left}; unexpected: none"):
        load_state(model, {}, "here", [pattern])


def test_a_refused_state_changes_nothing():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"here: does not fit"):
        load_state(model, {"0.weight": torch.ones(2, 2)}, "here", ["0.*"])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_damage_is_one_clear_line(folder, tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such folder; allowed: a folder written by save_pretrained"):
        load_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_pretrained(tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"model.safetensors: damaged") as e:
        load_pretrained(folder)
    assert "\n" not in str(e.value)
    weights.write_bytes(b"")
    with pytest.raises(ValueError, match=r"model.safetensors: damaged"):
        load_pretrained(folder)
    weights.unlink()
    with pytest.raises(ValueError, match=r"no model.safetensors"):
        load_pretrained(folder)


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe", b"[]", b"3", b'{"config": {}}', b'{"model": "other"}'])
def test_a_file_that_is_no_config_is_one_clear_line(folder, content):
    (folder / "config.json").write_bytes(content)
    for load in (load_pretrained, HJEPA.from_pretrained):
        with pytest.raises(ValueError, match=r"config.json: (damaged|model=(None|'other'): not a config of)") as e:
            load(folder)
        assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("encoder", "dept"), 3, "config.encoder.dept: no field.*did you mean 'depth'"),
        (("encoder",), 3, "config.encoder=3: not a mapping"),
        (("encoder", "depth"), "3", r"config\.json: config\.encoder\.depth='3': of another type; allowed: int"),
        (("encoder", "depth"), 1.0, r"config\.encoder\.depth=1\.0: of another type"),
        (("encoder", "depth"), True, r"config\.encoder\.depth=True: of another type"),
        (("encoder", "depth"), -1, r"config\.json: config\.encoder: depth=-1: must be above 0"),
        (("encoder", "image_size"), "88", r"image_size='88': of another type; allowed: tuple\[int, \.\.\.\]"),
        (("encoder", "image_size"), [8, "8"], r"image_size=\[8, '8'\]: of another type"),
        (("encoder",), None, "config.encoder=None: of another type; allowed: EncoderConfig"),
        (("symlog",), "false", "config.symlog='false': of another type; allowed: bool"),
        (("targets",), 3, "targets=3: unknown choice; allowed: ema"),
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


def test_a_config_that_is_missing_is_not_the_default_one(folder):
    (folder / "config.json").write_text('{"model": "HJEPA"}')
    with pytest.raises(ValueError, match=r"config\.json: config=None: not a mapping"):
        load_pretrained(folder)


def test_files_are_for_whom_the_umask_leaves_them(tmp_path):
    before = os.umask(0o027)
    try:
        save_pretrained(small().build(), tmp_path)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}


@pytest.mark.parametrize("save", [save_pretrained, lambda model, folder: model.save_pretrained(folder)])
def test_what_cannot_be_saved_is_one_line_and_writes_nothing(tmp_path, save):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="file: is a file; allowed: a folder"):
        save(small().build(), tmp_path / "file")
    with pytest.raises(ValueError, match=r"a tensor without storage, like \d+ weights of the model"):
        save(small().build(device="meta"), tmp_path / "meta")
    with pytest.raises(ValueError, match="model=Linear: has no config"):
        save_pretrained(nn.Linear(2, 2), tmp_path / "linear")
    assert (tmp_path / "file").read_text() == "mine"
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_loaded_model_is_float32(tmp_path):
    save_pretrained(small().build(seed=4).to(torch.bfloat16), tmp_path)
    assert {value.dtype for value in load_pretrained(tmp_path).state_dict().values()} == {torch.float32}


def test_the_mixin_goes_through_the_hub_library_with_the_same_files(tmp_path, device):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    model = changed(small().build(seed=4)).to(device)
    model.save_pretrained(tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    card = huggingface_hub.ModelCard.load(tmp_path / "model" / "README.md")
    assert card.data.library_name == "hjepa-models"
    assert {"hjepa", "pytorch_model_hub_mixin"} <= set(card.data.tags)
    assert 'HJEPA.from_pretrained("path/to/this/folder")' in card.text
    for source in (tmp_path / "model", str(tmp_path / "model")):
        loaded = HJEPA.from_pretrained(source, device)
        assert type(loaded) is HJEPA
        assert loaded.config == model.config
        assert not loaded.training
        assert_equal_states(loaded, model)


def test_the_mixin_keeps_the_card_that_is_there(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    small().build(seed=4).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_the_mixin_serves_an_encoder_and_refuses_the_other_class(tmp_path):
    encoder = KeptEncoder(ENCODER)
    encoder.init_weights(torch.Generator().manual_seed(2))
    encoder.save_pretrained(tmp_path)
    assert_equal_states(KeptEncoder.from_pretrained(tmp_path), encoder)
    with pytest.raises(ValueError, match="model='KeptEncoder': not a config of HJEPA"):
        HJEPA.from_pretrained(tmp_path)


def test_the_mixin_is_as_strict_as_the_function(tmp_path):
    small().build(seed=4).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda state: state.update(stray=torch.zeros(1)))
    with pytest.raises(ValueError, match="unexpected: stray"):
        HJEPA.from_pretrained(tmp_path)
    HJEPA.from_pretrained(tmp_path, allow=["stray"])
    with pytest.raises(ValueError, match="allow='stary': matches no key"):
        HJEPA.from_pretrained(tmp_path, allow=["stary"])


def test_a_repository_that_was_downloaded_before_is_found_without_a_network(tmp_path):
    model = changed(small().build(seed=4))
    repository = tmp_path / "models--owner--name"
    model.save_pretrained(repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    loaded = HJEPA.from_pretrained("owner/name", cache_dir=tmp_path, local_files_only=True)
    assert_equal_states(loaded, model)


@pytest.mark.parametrize("source", ["nowhere", "owner/other", "a/b/c", "./nowhere", Path("nowhere"), "owner--/name..x"])
def test_a_path_that_leads_nowhere_is_one_clear_line(source, tmp_path):
    with pytest.raises(ValueError, match="no such folder") as e:
        HJEPA.from_pretrained(source, cache_dir=tmp_path, local_files_only=True)
    assert "\n" not in str(e.value)
