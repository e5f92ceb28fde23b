"""What the dry run predicts is what a step takes where it can be measured."""

import json
import re

import pytest
import torch

from hjepa_pretrain import dry_run, settings
from hjepa_pretrain.cli import main
from hjepa_pretrain.dry_run import plan_model, step_cost_of
from hjepa_pretrain.task import build_task
from hjepa_train.precision import autocast

WORDS = (
    "preset=none", "recipe=hjepa", "model=vit_tiny_patch16", "hjepa.encoder.depth=4", "hjepa.pyramid.fpn_dim=64",
    "hjepa.predictor={depth: 2, embed_dim: 96, num_heads: 3}", "data.image_size=[96,96]",
)  # fmt: skip


def loss_of(config, device, rows):
    """The model of a run on a device, and the forward pass of a micro-batch like the one that is planned."""
    model = build_task(config).model.to(device)
    masks = config.masks.build(config.run.seed)(0, torch.arange(rows))
    views = [torch.rand(rows, 3, *config.data.image_size, device=device)]
    return model, lambda: model(views, masks.context.to(device), masks.targets.to(device), 0).loss


def measured_peak(run, path):
    """Bytes that PyTorch held at most beyond what it held before, by the profiler's records of each allocation."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    profile.export_chrome_trace(str(path))
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def step(config, loss, device):
    with autocast(config.trainer.precision, device):
        value = loss()
    value.backward()


def rows_of(out):
    """The cells of a printed table by the name of their row."""
    return {name: cells for name, *cells in (re.split(r"\s{2,}", line.strip()) for line in out.splitlines())}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_memory_of_a_step_is_what_was_planned(precision, tmp_path):
    config = settings.load([*WORDS, "data.batch_size=16", "plan.dry=true", f"trainer.precision={precision}"])[0]
    cost = step_cost_of(config)
    cpu = torch.device("cpu")
    _, loss = loss_of(config, cpu, 16)
    peak = measured_peak(lambda: step(config, loss, cpu), tmp_path / "trace.json")
    assert cost.peak_bytes == pytest.approx(peak, rel=0.02)
    assert cost.activation_bytes < cost.peak_bytes


@pytest.mark.cuda
def test_the_memory_of_a_gpu_is_what_was_planned():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    device = torch.device("cuda")
    words = ("model=vit_base_patch16", "data.image_size=[224,224]", "data.batch_size=64", "hjepa.pyramid.fpn_dim=512")
    config = settings.load(["preset=none", "recipe=hjepa", *words, "plan.dry=true", "run.device=cuda"])[0]
    plan = plan_model(config)
    model, loss = loss_of(config, device, 64)
    optimizer = config.trainer.optimizer.build(model)
    for _ in range(2):
        step(config, loss, device)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    torch.cuda.reset_peak_memory_stats()
    step(config, loss, device)
    assert plan.memory_bytes == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.15)


def test_recomputed_blocks_keep_their_inputs_alone():
    words = [*WORDS, "data.batch_size=16", "plan.dry=true"]
    kept, again = (step_cost_of(settings.load([*words, *extra])[0]) for extra in ((), ("trainer.recompute=[Block]",)))
    assert again.activation_bytes < 0.3 * kept.activation_bytes
    assert again.peak_bytes < kept.peak_bytes
    assert 1.1 < again.flops / kept.flops < 1.4


def test_the_command_prints_a_column_for_each_model(capsys, tmp_path, monkeypatch):
    plans = []
    monkeypatch.setattr(dry_run, "plan_model", lambda config: plans.append(plan_model(config)) or plans[-1])
    models = "plan.models=[vit_tiny_patch16,vit_nano_patch16]"
    words = [*WORDS, "parallel=fsdp", "plan.dry=true", "plan.world_size=256", "data.batch_size=512", models]
    assert main([*words, f"run.dir={tmp_path}/run"]) == 0
    out = capsys.readouterr().out
    for word in (
        "fsdp on 256 ranks",
        "vit_tiny_patch16",
        "vit_nano_patch16",
        "optimizer",
        "sent a step",
        "2 images a rank",
    ):
        assert word in out
    rows = rows_of(out)
    for name, shown in {
        "parameters": lambda plan: f"{plan.parameters / 1e6:.0f} M",
        "optimizer": lambda plan: f"{plan.optimizer_bytes / 2**20:.1f} MiB",
        "activations": lambda plan: f"{plan.activation_bytes / 2**20:.1f} MiB",
        "sent a step": lambda plan: f"{plan.sent_bytes / 1e9:.3f} GB",
        "step": lambda plan: f"{plan.seconds * 1e3:.1f} ms",
    }.items():
        assert rows[name] == [shown(plan) for plan in plans], name
    assert not (tmp_path / "run").exists()
    assert main([*WORDS, "plan.dry=true", "plan.world_size=256", "data.batch_size=100"]) == 2
    assert "allowed: multiples of 256" in capsys.readouterr().err


def test_offloading_is_planned_without_a_gpu(capsys):
    words = [*WORDS, "parallel=fsdp", "plan.dry=true", "plan.world_size=8", "data.batch_size=16"]
    assert main([*words, "trainer.parallel.fsdp.cpu_offload=true"]) == 0
    out = capsys.readouterr().out
    for word in ("memory of the host", "over the bus a step", "neither the bus nor the optimizer"):
        assert word in out
    assert main(words) == 0
    assert "host" not in capsys.readouterr().out


@pytest.mark.slow
def test_models_that_nobody_names_are_the_three_large_ones(capsys):
    # Two blocks each: the widths and the way are those of the whole models, which take ten times as long to plan.
    words = ["plan.dry=true", "plan.world_size=256", "parallel=fsdp", "data.batch_size=16384"]
    assert main([*words, "hjepa.encoder.depth=2", "hjepa.predictor.depth=1"]) == 0
    out = capsys.readouterr().out
    rows = rows_of(out)
    assert rows["per rank"] == ["vit_large_patch16", "vit_huge_patch14", "vit_giant_patch14"]
    assert "64 images a rank in 1 micro-batches" in out
    for weights, parameters in zip(rows["weights"], rows["parameters"], strict=True):
        (size, unit), (count, million) = weights.split(), parameters.split()
        assert (unit, million) == ("MiB", "M")
        assert float(size) * 2**20 * 256 == pytest.approx(4e6 * float(count), rel=0.1)
    assert rows["memory"][2].endswith("GiB")
    sent = [float(cell.split()[0]) for cell in rows["sent a step"]]
    assert sent == sorted(sent)
    assert sent[0] > 0
