"""The commands, on a tiny run."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import warnings

import numpy as np
import pytest
import torch

from hjepa_benchmark import probes, rivals
from hjepa_benchmark.cli import main
from hjepa_benchmark.quantize import measure_quantization
from hjepa_benchmark.suite import run as suite_run
from hjepa_data import ShardSource
from hjepa_models import Encoder, load_pretrained
from hjepa_models.quantization import quantize_int8, weight_bytes
from hjepa_pretrain import settings
from hjepa_pretrain.cli import main as pretrain
from hjepa_pretrain.evaluation import load_pair, open_sources


def test_probes_of_a_run(run, tmp_path, capsys):
    assert main(["probes", str(run), "--json", str(tmp_path / "rows.json")]) == 0
    assert "untrained" in capsys.readouterr().out
    again, first = (json.loads(path.read_text())["rows"] for path in (tmp_path / "rows.json", run / "results.json"))
    assert again == first


def test_quantize_prints_the_accuracy_of_both_and_their_bytes(run, tmp_path, capsys):
    pytest.importorskip("torchao")
    assert main(["quantize", str(run), "--json", str(tmp_path / "rows.json")]) == 0
    found = json.loads((tmp_path / "rows.json").read_text())
    model = load_pretrained(run)
    assert [row["level"] for row in found["rows"]] == [str(level) for level in model.feature_levels]
    # The accuracy of the floats is the one that the run was measured with; two steps of so small a model tell little.
    measured = {
        row["level"]: row[f"knn_{found['k']}"]
        for row in json.loads((run / "results.json").read_text())["rows"]
        if row["features"] == "trained"
    }
    assert {row["level"]: row["floats"] for row in found["rows"]} == pytest.approx(measured)
    assert all(row["drop"] == pytest.approx(100 * (row["floats"] - row["int8"])) for row in found["rows"])
    assert found["bytes"] == {"floats": weight_bytes(model), "int8": weight_bytes(quantize_int8(model))}
    assert found["bytes"]["int8"] < 0.5 * found["bytes"]["floats"]
    printed = " ".join(capsys.readouterr().out.split())
    for row in found["rows"]:
        assert f"{row['level']} {row['floats']:.3f} {row['int8']:.3f} {row['drop']:+.2f}" in printed
    assert f"{found['bytes']['floats']:,} -> {found['bytes']['int8']:,} bytes" in printed


def test_a_baseline_can_be_quantized(train, shards, capsys):
    pytest.importorskip("torchao")
    run = train("simclr", "recipe=simclr", "eval.at_end=false")
    capsys.readouterr()
    assert main(["quantize", str(run)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "encoder" in printed
    # The bytes are those of the weights that are kept.
    assert f"{weight_bytes(Encoder.from_pretrained(run)):,} ->" in printed
    for shard in shards.glob("eval-*.tar"):
        without_labels(shard, run / shard.name)
    assert main(["quantize", str(run), "--eval", f"{run}/eval-*.tar"]) == 2
    assert "no held-out image has a label" in capsys.readouterr().err


def without_labels(shard, path):
    with tarfile.open(shard) as tar, tarfile.open(path, "w") as bare:
        for member in tar.getmembers():
            if not member.name.endswith(".cls"):
                bare.addfile(member, tar.extractfile(member))


def test_quantized_weights_are_those_that_are_measured(run):
    pytest.importorskip("torchao")
    config, _ = settings.load([f"run.dir={run}"])
    train, test = load_pair(config, open_sources(config), 100, 60)
    model = load_pretrained(run)
    broken = load_pretrained(run)
    with torch.no_grad():
        for parameter in broken.parameters():
            parameter.zero_()
    rows = measure_quantization(model, broken, config, train, test, torch.device("cpu"))
    assert any(row.drop != 0 for row in rows)
    assert all(row.drop == 0 for row in measure_quantization(model, model, config, train, test, torch.device("cpu")))


@pytest.mark.slow
def test_loader_compares_all_that_are_installed(shards, tmp_path):
    # In a process of its own: webdataset leaves files open.
    options = ["--size", "32", "--images", "100", "--repeats", "2", "--json", str(tmp_path / "l.json")]
    command = [sys.executable, "-m", "hjepa_benchmark", "loader", f"{shards}/train-*.tar", *options]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True).stdout
    found = json.loads((tmp_path / "l.json").read_text())
    names = [row["loader"] for row in found["rows"]]
    assert ("hjepa-data, nvJPEG" in names) == torch.cuda.is_available()
    assert [name for name in names if name != "hjepa-data, nvJPEG"][:5] == [
        "hjepa-data",
        "plain loop, Pillow",
        "plain loop, torchvision",
        "ImageFolder + DataLoader",
        "webdataset.WebLoader",
    ]
    ours = found["rows"][0]["speeds"]
    for row in found["rows"]:
        assert row["loader"] in printed
        assert len(row["speeds"]) == 2
        ratios = sorted(one / other for one, other in zip(ours, row["speeds"], strict=True))
        assert row["ratio"] == pytest.approx(sum(ratios) / 2)


def test_rivals_give_crops_of_the_images(shards, tmp_path):
    """A rival that gave less than it should would be fast."""
    setup = rivals.Setup(source=ShardSource(shards / "train-*.tar"), folder=tmp_path, size=32, workers=1, images=100)
    given = []

    def collect(_, batches):
        given.append(next(batches))
        return 1.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rivals, "_timed", collect)
        for name, measure in rivals.all_loaders(setup).items():
            if name != "webdataset.WebLoader":
                measure(0)
    assert len(given) >= 2
    for batch in given:
        pixels = batch.views[0] if hasattr(batch, "views") else batch[0] if isinstance(batch, list | tuple) else batch
        pixels = torch.as_tensor(pixels)
        assert (pixels.dtype, tuple(pixels.shape)) == (torch.uint8, (50, 3, 32, 32))
        assert len({image.float().mean().item() for image in pixels}) > 40
    for crop in (rivals._pillow_crop, rivals._torchvision_crop):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            pixels = crop(rivals._bytes(setup.source, 0), 32, np.random.default_rng(0))
        assert (pixels.dtype, tuple(pixels.shape)) == (torch.uint8, (3, 32, 32))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["probes", "nowhere"], "nowhere"),
        (["quantize", "nowhere"], "nowhere"),
        (["loader", "nowhere.tar"], "nowhere.tar"),
        (["throughput", "run.stpes=2"], "run.steps"),
        (["throughput", "recipe=mae", "--reference"], "--reference"),
        (["throughput", "--stepz", "3"], "--stepz"),
        (["throughput", "--steps", "many"], "--steps"),
        (["suite=quick", "nowhere"], "nowhere"),
        (["suite=huge", "nowhere"], "huge"),
        (["suite", "nowhere", "extra"], "extra"),
        (["suite", ".", "--corruption-images", "0"], "--corruption-images=0"),
        (["suite", ".", "--folder", "imagenet-r"], "NAME=PATH"),
        (["suite", ".", "--folder", "r=nowhere"], "nowhere"),
        (["suite", ".", "--folder", "r=.", "--folder", "r=.."], "r is . already"),
        (["suite", ".", "--classes", "classes.txt"], "only --folder needs it"),
        (["compare", "one"], "two runs"),
        (["compare", "one", "two"], "one"),
        (["sweep", "run.stpes=1,2"], "run.steps"),
        (["sweep", "run.seed=0,1", "run.dir=x"], "run.dir=x: not with --multirun"),
        (["sweep", "run.seed=0,1", "nonsense"], "'nonsense' is not a setting; write key=a,b"),
        (["throughput", "trainer.accumulate=2"], "trainer.accumulate=2"),
        (["throughput", "parallel=ddp"], "parallel=ddp"),
        (["probes", "nowhere", "--json", "no/rows.json"], "--json=no/rows.json"),
        (["sweep", "run.seed=0,1", "--out", "no/page.html"], "--out=no/page.html"),
        (["compare", "one", "two", "--json", "."], "--json=."),
        (["everything"], "everything"),
        ([], "COMMAND"),
    ],
)
def test_wrong_input_is_one_line_and_code_2(arguments, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert expected in message
    assert len(message.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_an_interruption_is_one_line(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(probes, "probe_run", interrupted)
    assert main(["probes", "run"]) == 130
    assert capsys.readouterr().err.strip().splitlines() == ["hjepa-benchmark: interrupted; what it had written stands"]


def test_what_cannot_be_written_is_told_before_anything_is_measured(run, tmp_path, monkeypatch, capsys):
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    shutil.rmtree(copied / "benchmark", ignore_errors=True)
    (copied / "benchmark").touch()
    with monkeypatch.context() as patch:
        patch.setattr(suite_run, "measure", lambda *_: pytest.fail("measured for nothing"))
        assert main(["suite=quick", str(copied)]) == 1
        (copied / "benchmark").unlink()
        (copied / "metrics.jsonl").write_text("{torn")
        assert main(["suite=quick", str(copied)]) == 2
        patch.setattr(os, "access", lambda *_: False)
        assert main(["suite=quick", str(copied)]) == 1
        assert main(["probes", str(copied), "--json", str(tmp_path / "rows.json")]) == 2
    for place, line in zip(
        ("run/benchmark", "metrics.jsonl: damaged", "run/benchmark", "rows.json"),
        capsys.readouterr().err.splitlines(),
        strict=True,
    ):
        assert place in line


def test_weights_that_are_gone_can_be_had_again(run, tmp_path, capsys):
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    (copied / "model.safetensors").unlink()
    assert main(["probes", str(copied)]) == 2
    assert f"is written again by hjepa-pretrain run.dir={copied}" in capsys.readouterr().err
    assert pretrain([f"run.dir={copied}"]) == 0
    assert main(["probes", str(copied)]) == 0


def test_help_needs_no_torch():
    code = "import sys; from hjepa_benchmark.cli import _parser; _parser().format_help(); print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout.strip() == "False"
