import itertools

import pytest
import torch

from hjepa_models import (
    AttentionBackend,
    EncoderConfig,
    FeaturePool,
    GlobalConfig,
    HJEPAConfig,
    Position,
    PredictorConfig,
    PyramidConfig,
    Stem,
)
from hjepa_models import export as export_module
from hjepa_models.export import _move, export_features, export_onnx, output_names

BATCHES = (1, 3, 5)
FUSED = PyramidConfig(levels=3, fpn="concat", fpn_dim=8)
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


def small(*, image_size=(20, 12), patch_size=(4, 4), pyramid=None, **fields):
    """A model whose target branch differs from its online one, in training mode."""
    encoder = EncoderConfig(
        image_size=image_size, patch_size=patch_size, embed_dim=24, depth=1, num_heads=2, stem_channels=(6,), **fields
    )
    config = HJEPAConfig(
        encoder=encoder,
        predictor=PredictorConfig(depth=1, embed_dim=24, num_heads=2),
        pyramid=pyramid or PyramidConfig(levels=3),
        global_level=GlobalConfig(hidden_dim=8, out_dim=4, depth=2),
    )
    model = config.build(seed=1)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(torch.rand(buffer.shape, generator=generator))
    return model


def features(model, images, level, pool, branch="target"):
    """What an export must give, as a tuple."""
    modes = [module.training for module in model.modules()]
    model.eval()
    if level is None:
        found = tuple(model.all_features(images, pool, branch).values())
    else:
        found = (model.features(images, level, pool, branch),)
    for module, mode in zip(model.modules(), modes, strict=True):
        module.training = mode
    return found


def run(path, images):
    """The outputs of ONNX Runtime."""
    onnxruntime = pytest.importorskip("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    assert [each.name for each in session.get_inputs()] == ["images"]
    found = session.run(None, {"images": images.cpu().numpy()})
    return dict(zip((each.name for each in session.get_outputs()), map(torch.from_numpy, found), strict=True))


def assert_onnx_equals(path, model, level, pool, branch="target", device="cpu", to_input=lambda images: images):
    channels, size = model.config.encoder.in_channels, model.config.encoder.image_size
    for batch in BATCHES:
        images = torch.rand(batch, channels, *size)
        expected = features(model, to_input(images).to(device), level, pool, branch)
        found = run(path, images)
        assert tuple(found) == output_names(model, level)
        for name, ours in zip(found, expected, strict=True):
            assert found[name].shape == ours.shape
            torch.testing.assert_close(found[name], ours.cpu(), atol=1e-4, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(autouse=True)
def _needs_onnx(request):
    if "onnx" in request.node.name:
        pytest.importorskip("onnxscript")


def choices():
    """Every position with the other choices taken in turn: a trace takes seconds."""
    stems, attentions, pools = map(itertools.cycle, (Stem, ("explicit", "sdpa"), FeaturePool))
    for number, position in enumerate(Position):
        marks = [pytest.mark.slow] if number else []
        yield pytest.param(position, next(stems), next(attentions), next(pools), marks=marks)


@pytest.mark.parametrize(("position", "stem", "attention", "pool"), list(choices()))
def test_onnx_runtime_agrees_at_every_level_and_batch_size(position, stem, attention, pool, tmp_path, device):
    convolutions = {"stem_norm": "batch", "stem_blocks": (1,)} if stem in (Stem.conv, Stem.overlap) else {}
    model = small(position=position, stem=stem, attention=attention, **convolutions).to(device)
    export_onnx(model, tmp_path / "model.onnx", pool=pool)
    assert output_names(model, None) == ("encoder", "level_0", "level_1", "level_2", "global")
    assert_onnx_equals(tmp_path / "model.onnx", model, None, pool, device=device)


PARTS = {
    "many": {
        "attention": AttentionBackend.sdpa,
        "stem": Stem.overlap,
        "registers": 2,
        "qk_norm": True,
        "layer_scale": 0.3,
        "mlp": "swiglu",
        "drop_path": 0.5,
        "activation_checkpointing": True,
        "pyramid": PyramidConfig(levels=3, pooling="learned", fpn="add", fpn_dim=8),
    },
    "hybrid patch sizes": {
        "image_size": (16, 8),
        "stem": Stem.flexi,
        "processing_patch_size": (8, 8),
        "output_patch_size": (4, 4),
        "upsampling": "learned",
    },
    "1-D": {
        "image_size": (24,),
        "patch_size": (4,),
        "stem": Stem.conv,
        "pyramid": PyramidConfig(levels=3, pooling="sequence", pad=True),
    },
    "3-D": {"image_size": (8, 8, 8), "patch_size": (2, 4, 4), "attention": AttentionBackend.explicit},
}


@pytest.mark.slow
@pytest.mark.parametrize("fields", PARTS.values(), ids=PARTS)
def test_onnx_runtime_agrees_for_other_parts(fields, tmp_path, device):
    model = small(**fields).to(device)
    export_onnx(model, tmp_path / "model.onnx", pool="none", branch="online")
    assert_onnx_equals(tmp_path / "model.onnx", model, None, "none", "online", device)


def test_onnx_of_one_level_takes_pixels_and_tells_what_it_is(tmp_path, device):
    onnx = pytest.importorskip("onnx")
    model = small().to(device)
    path = tmp_path / "model.onnx"
    export_onnx(model, path, 1, "flatten", "online", mean=MEAN, std=STD, opset=18)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    assert_onnx_equals(path, model, 1, "flatten", "online", device, lambda images: (images - mean) / std)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    stored = onnx.load(path)
    onnx.checker.check_model(stored, full_check=True)
    assert {each.domain: each.version for each in stored.opset_import}[""] == 18
    assert {each.key: each.value for each in stored.metadata_props} == {
        "level": "1",
        "pool": "flatten",
        "branch": "online",
        "mean": "0.4, 0.5, 0.6",
        "std": "0.2, 0.3, 0.25",
    }
    shapes = {each.name: each.type.tensor_type.shape.dim for each in (*stored.graph.input, *stored.graph.output)}
    assert {name: [d.dim_param or d.dim_value for d in dims] for name, dims in shapes.items()} == {
        "images": ["batch", 3, 20, 12],
        "features": ["batch", 6 * 24],
    }


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch 2.11 says so of its own buffer
def test_a_program_runs_at_every_batch_size_after_saving_and_loading(tmp_path, device):
    model = small(pyramid=FUSED).to(device)
    program = export_features(model, None, "none")
    torch.export.save(program, tmp_path / "features.pt2")
    loaded = torch.export.load(tmp_path / "features.pt2")
    for batch in BATCHES:
        images = torch.randn(batch, 3, 20, 12, device=device)
        expected = features(model, images, None, "none")
        for one in (program, loaded):
            found = one.module()(images)
            assert len(found) == 5
            for ours, theirs in zip(expected, found, strict=True):
                torch.testing.assert_close(theirs, ours)
                assert not theirs.requires_grad


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields", [{"stem": "conv", "stem_norm": "batch"}, {"position": "rope_mixed", "pyramid": FUSED}]
)
def test_a_program_leaves_the_cpu_with_all_that_it_holds(fields):
    """A device without values stands for a GPU."""
    program = _move(export_features(small(**fields), None, mean=MEAN, std=STD), torch.device("meta"))
    moved = program.module()
    assert "cpu" not in moved.code  # neither made there nor kept from another device's autocast
    assert {tensor.device.type for tensor in (*program.state_dict.values(), *program.constants.values())} == {"meta"}
    if "position" not in fields:  # PyTorch knows no autocast of such a device
        found = moved(torch.empty(5, 3, 20, 12, device="meta"))
        assert [each.shape for each in found] == [(5, 24)] * 4 + [(5, 4)]


@pytest.mark.slow
@pytest.mark.parametrize("level", ["encoder", 0, 2, "global"])
def test_a_program_of_one_level_takes_pixels_of_another_size(level, device):
    model = small().to(device)
    program = export_features(model, level, mean=MEAN, std=STD, image_size=(12, 16))
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, STD))
    for batch in BATCHES:
        images = torch.rand(batch, 3, 12, 16, device=device)
        expected = features(model, (images - mean) / std, level, "mean")[0]
        torch.testing.assert_close(program.module()(images), expected)


def test_exporting_leaves_the_model_as_it_was_and_shares_nothing_with_it(device):
    model = small(stem="conv", stem_norm="batch", drop_path=0.5, attention="flex").to(device)
    model.pyramid.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    state = {key: value.clone() for key, value in model.state_dict().items()}
    images = torch.randn(3, 3, 20, 12, device=device)
    expected = features(model, images, 1, "mean", "online")[0]
    program = export_features(model, 1, branch="online")
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert len(set(modes.values())) == 2
    assert model.encoder.transformer.blocks[0].attn.backend is AttentionBackend.flex
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.encoder.parameters())
    # Neither the predictor nor the target branch goes along.
    assert {key.split(".")[1] for key in program.state_dict} == {"encoder", "pyramid"}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(program.module()(images), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"level": 3}, "level=3: the model has no such level; allowed: encoder, 0, 1, 2, global"),
        ({"pool": "max"}, "pool='max': unknown choice; allowed: mean, none, flatten"),
        ({"branch": "student"}, "branch='student': unknown choice"),
        ({"image_size": (20, 13)}, "axis 1 has 13 pixels"),
        ({"mean": MEAN}, "std=None: does not fit; allowed: 3 numbers"),
        ({"mean": (0.5,), "std": STD}, r"mean=\(0.5,\): does not fit"),
        ({"mean": 0.5, "std": 0.5}, "mean=0.5: does not fit"),
        ({"image_size": 20}, "image_size=20: no sequence"),
        ({"mean": MEAN, "std": (0.2, float("nan"), 0.2)}, "divides by 0"),
        ({"mean": MEAN, "std": (0.2, 0.0, 0.2)}, r"std=\(0.2, 0.0, 0.2\): divides by 0"),
    ],
)
@pytest.mark.parametrize(
    "export",
    [export_features, lambda model, **fields: export_onnx(model, "unused", **fields)],
    ids=["program", "onnx"],
)
def test_what_cannot_be_exported_is_one_line(export, arguments, message):
    model = small()
    with pytest.raises(ValueError, match=message) as e:
        export(model, **arguments)
    assert "\n" not in str(e.value)
    assert model.training


def test_a_file_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    with pytest.raises(ValueError, match=r"missing/model\.onnx: its folder does not exist"):
        export_onnx(small(), tmp_path / "missing" / "model.onnx")


@pytest.mark.filterwarnings("ignore")
def test_an_opset_that_onnx_cannot_convert_the_graph_to_is_refused(tmp_path):
    with pytest.raises(ValueError, match="opset=15: the graph could not be converted from"):
        export_onnx(small(), tmp_path / "model.onnx", "encoder", opset=15)
    assert not (tmp_path / "model.onnx").exists()


def test_a_missing_package_is_named_with_the_extra_that_brings_it(monkeypatch):
    monkeypatch.setattr(export_module, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(ValueError, match=r"'onnxscript': not installed.*hjepa-models\[onnx\]"):
        export_onnx(small(), "unused")
