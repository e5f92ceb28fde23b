"""The training step: its speed, its parts, what it asks of the machine, and the plain step beside it."""

import fcntl
import json
import os
import threading
import warnings
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from hjepa_benchmark.cli import main
from hjepa_benchmark.throughput import measure
from hjepa_benchmark.throughput.count import graph_breaks, host_synchronisations, matmul_peak, operations, operations_of
from hjepa_benchmark.throughput.reference import PlainAttention, ReferenceStep
from hjepa_benchmark.throughput.step import PREDICTOR, PYRAMID, TrainingStep
from hjepa_pretrain import settings
from hjepa_pretrain.baselines.supervised import Supervised
from hjepa_train.precision import Precision

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config(tiny):
    words = ("recipe=hjepa", "data.train=synthetic", *tiny, "hjepa.pyramid.fpn_dim=32", "trainer.precision=fp32")
    return settings.load(words)[0]


@pytest.fixture(scope="module")
def step(config):
    return TrainingStep(config, CPU)


def test_the_command_prints_and_keeps_everything(tiny, tmp_path, capsys):
    words = ["recipe=hjepa", "--steps", "3", "--reference", "--json", str(tmp_path / "t.json"), *tiny]
    assert main(["throughput", *words, "hjepa.pyramid.fpn_dim=32"]) == 0
    printed = capsys.readouterr().out
    for word in (
        "images/s",
        "ms a step",
        "plain I-JEPA step",
        "graph breaks",
        "host synchronisations",
        PREDICTOR,
        PYRAMID,
    ):
        assert word in printed
    assert "median of 3 steps" in printed
    found = json.loads((tmp_path / "t.json").read_text())
    done = found["operations"] / found["milliseconds"] / 1e9
    row = next(line for line in printed.splitlines() if line.split()[:1] == ["done"])
    assert row.split()[1:3] == [f"{done:,.3g}", "TFLOP/s"]
    assert found["steps"] == 3
    assert found["images_per_second"] == pytest.approx(16e3 / found["milliseconds"])
    assert list(found["parts"]) == ["input", "masks", "target", "context", PYRAMID, PREDICTOR, "optimizer", "EMA"]
    assert found["utilisation"] == pytest.approx(
        found["operations"] / (found["milliseconds"] / 1e3) / found["matmul_peak"]
    )
    # The pixels of the recipe, not those of the demo, and its preset's tricks are off.
    assert (found["image_size"], found["batch_size"], found["recipe"]) == ([32, 32], 16, "hjepa")
    assert found["peak_gib"] is None
    assert found["host_synchronisations"] is None
    assert found["reference"]["speedup"] > 0


def test_parts_can_be_left_out(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.delattr(TrainingStep, "parts")
    words = ["recipe=hjepa", "--steps", "1", "--no-parts", "--json", str(tmp_path / "t.json"), *tiny]
    assert main(["throughput", *words]) == 0
    assert json.loads((tmp_path / "t.json").read_text())["parts"] == {}
    printed = capsys.readouterr().out
    assert "median of 1 steps" in printed
    assert "parts are timed" not in printed
    assert PREDICTOR not in printed


@pytest.mark.parametrize(
    ("device", "every", "asked", "timed"), [("cpu", 1, 9, 9), ("cpu", 2, 3, 4), ("cuda", 1, 9, 10), ("cuda", 4, 9, 16)]
)
def test_the_steps_that_are_told_are_those_that_were_timed(monkeypatch, device, every, asked, timed):
    done = []

    def step(number):
        done.append(number)

    step.every = every
    monkeypatch.setattr(measure, "milliseconds", lambda work, _: work() or 1.0)
    _, _, told = measure._in_turn(step, None, asked, torch.device(device))
    assert told == len(done) == timed


def test_local_views_are_in_the_step(tiny, monkeypatch):
    words = ("recipe=hjepa_global", "data.train=synthetic", *tiny, "trainer.precision=fp32", "hjepa.predict_every=1")
    local = ("data.local_views=2", "data.local_size=[16,16]")
    alone, step = (TrainingStep(settings.load([*words, *more])[0], CPU) for more in ((), local))
    assert [tuple(view.shape[2:]) for view in step.batch.views] == [(32, 32), (32, 32), (16, 16), (16, 16)]
    assert [tuple(crop.shape) for crop in step.batch.crops] == [(len(step.batch), 5)] * 4
    assert operations(step) > operations(alone)
    encoder, encoded = step.task.model.encoder, set()
    scales = encoder.scales
    monkeypatch.setattr(encoder, "scales", lambda x, maps: encoded.add(tuple(x.shape)) or scales(x, maps))
    assert step.parts(repeats=1, warmup=0)["whole views"] > 0
    rows = 2 * len(step.batch)
    assert encoded == {(rows, 3, 32, 32), (rows, 3, 16, 16)}


def test_a_model_is_measured_at_the_size_of_its_recipe(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(measure, "measure_throughput", lambda config, **_: seen.append(config))
    monkeypatch.setattr(measure, "_table", lambda *_: "")
    for words in (["recipe=hjepa", "model=vit_base_patch16", "data.batch_size=256"], []):
        measure.print_throughput(words, steps=4, reference=False, output=None)
    assert seen[0].data.image_size == (224, 224)
    assert seen[0].hjepa.encoder.embed_dim == 768
    assert seen[1].data.image_size == (32, 32)


def test_the_few_images_that_are_counted_keep_their_crops(step, monkeypatch):
    counted, run = [], step.forward_backward
    monkeypatch.setattr(step, "forward_backward", lambda number: counted.append(step.batch) or run(number))
    whole = step.batch
    operations(step)
    for batch in counted:
        assert [len(crop) for crop in batch.crops] == [len(batch)] * len(whole.views)
        assert all(torch.equal(part, crop[: len(batch)]) for part, crop in zip(batch.crops, whole.crops, strict=True))
    assert counted


def test_operations_are_those_of_the_matrix_products(step, config):
    """Counted by hand: every linear map and attention of the three passes; backward is twice forward."""
    encoder, predictor = config.hjepa.encoder, config.hjepa.predictor

    def blocks(tokens, width, depth, ratio):
        return depth * (2 * tokens * width * width * (4 + 2 * ratio) + 4 * tokens**2 * width)

    n = encoder.num_patches
    context, targets = step.task.draw_masks(0, step.batch.sample)
    seen, hidden = context.shape[1], targets.shape[1] * targets.shape[2]
    embed = 2 * 3 * encoder.patch_size[0] ** 2 * encoder.embed_dim
    target = n * embed + blocks(n, encoder.embed_dim, encoder.depth, encoder.mlp_ratio)
    online = seen * embed + blocks(seen, encoder.embed_dim, encoder.depth, encoder.mlp_ratio)
    inner = blocks(seen + hidden, predictor.embed_dim, predictor.depth, predictor.mlp_ratio)
    inner += 2 * (seen + hidden) * predictor.embed_dim * encoder.embed_dim
    least = len(step.batch) * (target + 2.5 * (online + inner))
    most = len(step.batch) * (target + 3 * (online + inner))
    found = operations(step)
    # The rest is the pyramid's: three levels of two branches.
    assert least < found < 6 * most
    assert found == pytest.approx(operations(step))
    assert len(step.batch) == config.data.batch_size
    x = torch.randn(8, 16)
    assert operations_of(lambda: x @ x.T) == 2 * 8 * 16 * 8
    ending_in_gelu = partial(torch._addmm_activation, torch.zeros(8), x, x.T, use_gelu=True)
    assert operations_of(ending_in_gelu) == 2 * 8 * 16 * 8


def test_what_is_done_twice_is_counted_once(tiny, monkeypatch):
    words = ("recipe=hjepa", "data.train=synthetic", *tiny, "trainer.precision=fp32", "trainer.recompute=[Block]")
    step = TrainingStep(settings.load(words)[0], CPU)
    counted = operations(step)
    step.recompute()
    assert operations(step) > counted
    monkeypatch.setattr(measure, "graph_breaks", lambda _: 0)
    monkeypatch.setattr(measure, "matmul_peak", lambda *_: 1e9)
    assert measure.measure_throughput(step.config, steps=1).operations == counted


def test_breaks_peaks_and_synchronisations(step):
    assert graph_breaks(step) == 0
    assert host_synchronisations(step) is None
    assert matmul_peak(Precision.fp32, CPU, seconds=0.01) > 1e8


@pytest.mark.parametrize("words", [["recipe=simclr"], ["recipe=supervised", "baseline.num_classes=3"]])
def test_baselines_have_a_step_too(words, tiny, capsys):
    tiny = [word for word in tiny if not word.startswith("masks.")]
    assert main(["throughput", *words, "--steps", "2", *tiny]) == 0
    printed = capsys.readouterr().out
    assert ("projectors, loss" if words == ["recipe=simclr"] else "forward, backward") in printed
    # Neither hides patches.
    assert not any(part in printed for part in ("context", "masks", "predictor", "targets"))
    assert main(["throughput", *words, "--steps", "2", *tiny, "--reference"]) == 2
    assert "has no masks" in capsys.readouterr().err


def test_a_break_is_counted(step, monkeypatch):
    whole = type(step.task.model).target_levels

    def target_levels(model, *arguments):
        print("", end="")  # what no graph can hold
        return whole(model, *arguments)

    monkeypatch.setattr(type(step.task.model), "target_levels", target_levels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert graph_breaks(step) >= 1


@pytest.mark.parametrize("breaks", [False, True])
def test_a_break_of_a_compiled_step_is_counted_as_it_is_compiled(breaks, tiny, monkeypatch):
    """HJEPA refuses to be cut; a baseline is cut, and is as slow as its pieces."""
    tiny = [word for word in tiny if not word.startswith("masks.")]
    compiled = ("trainer.compile=true", "trainer.compile_backend=eager")
    words = ("recipe=supervised", "baseline.num_classes=3", "data.train=synthetic", *tiny, *compiled)
    forward = Supervised.forward

    def cut(model, inputs):
        if breaks:
            torch._dynamo.graph_break()
        return forward(model, inputs)

    monkeypatch.setattr(Supervised, "forward", cut)
    monkeypatch.setattr(measure, "matmul_peak", lambda *_: 1e9)
    found = measure.measure_throughput(settings.load(words)[0], steps=1, parts=False)
    assert (found.graph_breaks > 0) is breaks


def test_programs_that_take_turns_are_timed_one_at_a_time(tiny, tmp_path, monkeypatch):
    turn, timing = tmp_path / "turn", measure._in_turn
    said = []

    def timed(*arguments):
        said.append(turn.read_text())
        return timing(*arguments)

    monkeypatch.setattr(measure, "_in_turn", timed)
    words = ["throughput", "recipe=hjepa", "--steps", "1", "--turn", str(turn), *tiny, "hjepa.pyramid.fpn_dim=32"]
    program = threading.Thread(target=main, args=(words,))
    with turn.open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        program.start()
        program.join(20)
        assert program.is_alive()
        assert said == []
    program.join(120)
    assert said == [str(os.getpid())]
    assert turn.read_text() == ""


def test_a_turn_that_cannot_be_taken_is_refused_at_once(tmp_path, capsys):
    assert main(["throughput", "--turn", str(tmp_path / "absent" / "turn")]) == 2
    assert "--turn=" in capsys.readouterr().err


def test_a_step_moves_both_branches(config):
    step = TrainingStep(config, CPU)
    for group in step.optimizer.param_groups:
        group["lr"] = 0.1
    model = step.task.model
    before = [next(one.parameters()).detach().clone() for one in (model.encoder, model.target_encoder)]
    step(0)
    after = [next(one.parameters()).detach() for one in (model.encoder, model.target_encoder)]
    moved = [(new - old).abs().max().item() for old, new in zip(before, after, strict=True)]
    assert moved[0] > 0
    assert moved[1] == pytest.approx(0.004 * moved[0], rel=1e-3)


def test_the_plain_attention_is_the_fused_one():
    attention = PlainAttention(8, 2)
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    query, key, value = attention.qkv(x).view(3, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
    fused = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(3, 5, 8)
    assert torch.allclose(attention(x), attention.out(fused), atol=1e-6)


def test_the_plain_step_learns_and_sees_the_same_tokens(config, step):
    context, targets = step.task.draw_masks(0, step.batch.sample)
    plain = ReferenceStep(config, context, targets, CPU)
    seen = []
    plain.predictor.register_forward_hook(lambda _, given, out: seen.append((given[0].shape, out.shape)))
    target = plain.target.norm.weight.detach().clone()
    losses = []
    for _ in range(6):
        plain.forward_backward()
        images = plain.encoder.embed.weight.detach().clone()
        plain()
        losses.append(images)
    assert seen[0][0][:2] == context.shape
    assert seen[0][1][:3] == targets.shape
    assert not torch.equal(losses[0], losses[-1])
    assert not torch.equal(target, plain.target.norm.weight)
    # As many parameters in the encoder as ours, up to the position of the norm and the layout of the patch embedding.
    ours = sum(one.numel() for one in step.task.model.encoder.parameters())
    assert sum(one.numel() for one in plain.encoder.parameters()) == pytest.approx(ours, rel=0.02)


@pytest.mark.parametrize("targets", ["detached", "ema"])
def test_prediction_of_views_has_its_parts(tiny, targets):
    tiny = [word for word in tiny if not word.startswith("masks.")]
    words = ("recipe=hjepa_global", "data.train=synthetic", *tiny, f"hjepa.targets={targets}")
    step = TrainingStep(settings.load(words)[0], CPU)
    parts = step.parts(repeats=1, warmup=0)
    target = ["target"] if targets == "ema" else []
    assert list(parts) == ["input", *target, "pyramid, losses", "whole views", "predictor", "optimizer", "EMA"]
    assert parts["pyramid, losses"] > 0
    assert graph_breaks(step) == 0
