"""A compiled step is one graph and is compiled once."""

import copy
import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hjepa_models import HJEPAConfig, LevelWeightsConfig, PredictorConfig, PyramidConfig, StateConfig, encoder_config
from hjepa_models.global_level import GlobalConfig

TOP = {"pool_heads": 4, "hidden_dim": 24, "out_dim": 8, "num_directions": 16}
STATE = StateConfig(recurrent_dim=16, hidden_dim=16, num_groups=2, num_classes=4)


def small_config(*, encoder=None, predictor=None, with_global=None, stem_maps=0, **fields):
    size = {"image_size": (16, 16), "embed_dim": 32, "depth": 2, "num_heads": 2}
    return HJEPAConfig(
        encoder=encoder_config("vit_nano_patch4", **(size | (encoder or {}))),
        predictor=PredictorConfig(**({"depth": 1, "embed_dim": 24, "num_heads": 2} | (predictor or {}))),
        pyramid=PyramidConfig(levels=2, fpn="add", fpn_dim=16),
        level_weights=fields.pop("level_weights", LevelWeightsConfig(weights=(1.0, 0.5))),
        global_level=GlobalConfig(**TOP, objective=with_global, stem_maps=stem_maps) if with_global else None,
        **fields,
    )


def batches(device, views, count):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        order = torch.stack([torch.randperm(16, generator=generator) for _ in range(4)]).to(device)
        images = [torch.randn(4, 3, 16, 16, generator=generator).to(device) for _ in range(views)]
        yield images, order[:, :6], order[:, 6:14].view(4, 2, 4)


CASES = {
    "hjepa": {},
    "hjepa_global": {"targets": "detached", "with_global": "sigreg"},
    "adaptive": {"level_weights": LevelWeightsConfig(kind="adaptive", weights=(1.0, 0.5))},
    "state": {"predictor": {"state": STATE}},
    "hybrid": {
        "encoder": {"stem": "flexi", "output_patch_size": (2, 2), "upsampling": "learned"},
        "targets": "projection",
        "output_tokens": 2,
    },
    "relative, registers, isolated": {
        "encoder": {"position": "relative", "registers": 2, "qk_norm": True, "layer_scale": 1e-4},
        "predictor": {"mode": "isolated"},
    },
    "view": {"targets": "detached", "with_global": "nt_xent", "prediction": "view", "center_targets": True},
    "view, map of the stem, a small view": {
        "encoder": {"stem": "overlap", "stem_channels": (8, 16), "stem_blocks": (0, 1), "stem_norm": "batch"},
        "targets": "detached",
        "with_global": "vicreg",
        "stem_maps": 1,
        "prediction": "view",
    },
    "contrast": {"objective": "patch_discrimination", "contrast": "batch", "instance_weight": 0.1},
}


def with_small(fields, views):
    return [*views, views[0][..., :8, 4:12]] if fields.get("stem_maps") else views


CROPS = [torch.tensor([crop] * 4) for crop in ((0.1, 0.2, 0.6, 0.5, 1.0), (0.0, 0.1, 0.9, 0.8, 0.0))]


@pytest.fixture(autouse=True)
def strict_compiler():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("fields", CASES.values(), ids=CASES.keys())
def test_fifty_steps_are_one_graph_without_recompiles(device, fields):
    """Forward, backward and optimizer; the graph is traced whole, and the numbers are those of the plain model."""
    graphs = []

    def count(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    model, plain = (small_config(**fields).build(seed=1, device=device) for _ in range(2))
    model.compile_step(backend=count)
    optimizers = [torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=0.01) for one in (model, plain)]
    for step, (views, context, target) in enumerate(batches(device, 2, 50)):
        losses = []
        for one, optimizer in zip((model, plain), optimizers, strict=True):
            if one is plain and step % 10:
                continue
            optimizer.zero_grad()
            seen = with_small(fields, views)
            loss = one(seen, context, target, step, [crop.to(device) for crop in CROPS]).loss
            loss.backward()
            losses.append(loss.detach())
            if one is model:
                optimizer.step()
        if len(losses) == 2:
            torch.testing.assert_close(losses[0], losses[1], atol=1e-4, rtol=1e-4)
        if step % 10 == 9:
            plain.load_state_dict(model.state_dict())
    assert len(graphs) == 1


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES.keys())
def test_a_step_on_a_gpu_makes_nothing_on_the_host_and_never_waits(fields):
    """On fake tensors, which refuse a mix of devices and to tell a value."""
    model = small_config(**fields).build(device="meta")
    with FakeTensorMode():
        for module in model.modules():
            for name, one in module._parameters.items():
                if one is not None:
                    empty = torch.empty(one.shape, device="cuda")
                    module._parameters[name] = torch.nn.Parameter(empty, requires_grad=one.requires_grad)
            module._buffers = {
                name: torch.empty(one.shape, dtype=one.dtype, device="cuda") for name, one in module._buffers.items()
            }
        with torch.device("cuda"):
            views, crops = [torch.empty(4, 3, 16, 16)] * 2, [torch.empty(4, 5)] * 2
            context, target = (torch.zeros(4, *shape, dtype=torch.int64) for shape in ((6,), (2, 4)))
        output = model(with_small(fields, views), context, target, 0, crops)
    found = {"loss": output.loss, **output.level_losses, **output.embeddings}
    assert {name: each.device.type for name, each in found.items()} == dict.fromkeys(found, "cuda")


@pytest.mark.slow
def test_a_curriculum_has_one_graph_for_each_plan(device):
    weights = LevelWeightsConfig(kind="curriculum", weights=(1.0, 0.5), ramp_start=(8, 4), ramp_end=(12, 6))
    model = small_config(level_weights=weights, with_global="sigreg", targets="detached").build(device=device)
    graphs = []
    model.compile_step(backend=lambda graph, _: graphs.append(graph) or graph.forward)
    with torch._dynamo.config.patch(error_on_recompile=False):
        for step, (views, context, target) in enumerate(batches(device, 2, 20)):
            model(views, context, target, step).loss.backward()
    assert len(graphs) == len({model.plan(step) for step in range(20)}) == 3


@pytest.mark.slow
def test_the_default_compiler_gives_the_same_losses_and_gradients(device):
    plain, compiled = (small_config(with_global="sigreg").build(seed=1, device=device) for _ in range(2))
    compiled.compile_step()
    for step, (views, context, target) in enumerate(batches(device, 2, 3)):
        results = []
        for model in (plain, compiled):
            model.zero_grad()
            loss = model(views, context, target, step).loss
            loss.backward()
            results.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
        for first, second in zip(*results, strict=True):
            torch.testing.assert_close(first, second, atol=1e-4, rtol=1e-3)


def test_a_copy_of_a_compiled_model_runs_itself(device):
    model = small_config().build(device=device)
    model.compile_step(backend="eager")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.predictor.parameters():
            parameter.zero_()
    views, context, target = next(batches(device, 2, 1))
    assert not torch.equal(model(views, context, target, 0).loss, twin(views, context, target, 0).loss)


def test_a_compiled_model_is_still_the_same_modules(device):
    model = small_config().build(device=device)
    keys = list(model.state_dict())
    model.compile_step(backend="eager")
    assert list(model.state_dict()) == keys
    assert dataclasses.asdict(model.config)
