"""The commands, on a tiny run."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from hjepa_benchmark import probes, rivals
from hjepa_benchmark.cli import main
from hjepa_benchmark.quantize import measure_quantization
from hjepa_benchmark.suite import run as suite_run
from hjepa_data import EvalConfig, ShardSource, WorkerError, normalize
from hjepa_eval import FeatureName, FeatureSet, evaluate, plus_minus, read_results
from hjepa_models import Encoder, load_pretrained
from hjepa_models.quantization import quantize_int8, weight_bytes
from hjepa_pretrain import settings
from hjepa_pretrain.cli import main as pretrain
from hjepa_pretrain.evaluation import load_pair, open_sources


def test_probes_of_a_run(run, tmp_path, capsys):
    assert main(["probes", str(run), "--json", str(tmp_path / "rows.json")]) == 0
    assert "untrained" in capsys.readouterr().out
    assert json.loads((tmp_path / "rows.json").read_text()) == json.loads((run / "results.json").read_text())


def test_probes_take_as_many_images_as_they_are_told(run, tmp_path, capsys):
    few = ["--train-samples", "30", "--eval-samples", "7", "--json", str(tmp_path / "rows.json")]
    assert main(["probes", str(run), *few]) == 0
    rows = [one for one in read_results(tmp_path / "rows.json").measurements if one.metric == "linear"]
    assert {(one.n_train, one.n) for one in rows} == {(30, 7)}
    capsys.readouterr()
    for words, told in (
        ("--train-samples=19", "too few where 20 neighbours vote; allowed: 20"),
        ("--eval-samples=0", "too"),
    ):
        assert main(["probes", str(run), words]) == 2
        assert capsys.readouterr().err.startswith(f"hjepa-benchmark: {words}: {told}")


def test_probes_say_whether_the_end_was_chosen_on_their_images(run, shards, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["early_stop"] = {"metric": "eval/encoder/knn_20"}
    config["eval"]["every_steps"] = 1
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    few = ["--train-samples", "30", "--eval-samples", "7", "--json", str(tmp_path / "rows.json")]
    for words, chosen in (([], "eval/encoder/knn_20"), (["--eval", f"{shards}/train-*.tar"], None)):
        assert main(["probes", str(tmp_path / "run"), *few, *words]) == 0
        assert read_results(tmp_path / "rows.json").about.get("early_stop") == chosen
        assert ("the end was chosen by" in " ".join(capsys.readouterr().out.split())) == (chosen is not None)


def test_probes_of_a_timm_model(shards, tmp_path, capsys):
    timm = pytest.importorskip("timm")
    where = ["--train", f"{shards}/train-*.tar", "--eval", f"{shards}/eval-*.tar"]
    assert main(["probes", "test_vit", *where, "--json", str(tmp_path / "rows.json")]) == 0
    found = read_results(tmp_path / "rows.json")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model("test_vit", num_classes=0)
    sets = []
    for split in ("train", "eval"):
        (batch,) = EvalConfig(size=(160, 160)).build(ShardSource(shards / f"{split}-*.tar"))
        pixels = normalize(batch.views[0], (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        name = FeatureName(branch="untrained online", level="encoder", pooling="own")
        with torch.inference_mode():
            sets.append(FeatureSet(values=model.eval()(pixels), labels=batch.labels, name=name))
    expected = evaluate(*sets).measurements()
    assert [(one.metric, one.name, one.n, one.n_train) for one in found.measurements] == [
        (one.metric, one.name, one.n, one.n_train) for one in expected
    ]
    for one, other in zip(found.measurements, expected, strict=True):
        assert (one.value, one.low, one.high) == pytest.approx((other.value, other.low, other.high), rel=1e-3)
    assert (found.model, found.about["pretrained"]) == ("test_vit", False)
    assert "untrained  online  encoder  own" in capsys.readouterr().out


def test_classes_of_other_numbers_are_refused_for_a_timm_model_too(tmp_path, capsys):
    pytest.importorskip("timm")
    for name, classes in {"one": ("bird", "cat"), "other": ("ant", "bird")}.items():
        for each in classes:
            (tmp_path / name / each).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / name / each / "1.png")
    assert main(["probes", "test_vit", "--train", f"{tmp_path}/one", "--eval", f"{tmp_path}/other"]) == 2
    assert "they number classes differently (ant, cat, ...)" in capsys.readouterr().err


def test_weights_of_a_mixture_are_not_those_of_other_images(run, shards, tmp_path, capsys):
    mixed = tmp_path / "mixed"
    shutil.copytree(run, mixed)
    config = yaml.safe_load((mixed / "config.yaml").read_text())
    one = f"{shards}/train-*.tar"
    config["data"] |= {"train": f"{one} + {one}", "weights": [2.0, 1.0]}
    (mixed / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["probes", str(mixed), "--train", one]) == 0
    assert "trained" in capsys.readouterr().out


def test_quantize_prints_the_accuracy_of_both_and_their_bytes(run, tmp_path, capsys):
    pytest.importorskip("torchao")
    assert main(["quantize", str(run), "--json", str(tmp_path / "rows.json")]) == 0
    found = read_results(tmp_path / "rows.json")
    model = load_pretrained(run)
    rows = {
        str(level): [one for one in found.measurements if one.name.level == str(level)]
        for level in model.feature_levels
    }
    own = {one.name: one for one in read_results(run / "results.json").measurements if one.metric == "knn_20"}
    printed = " ".join(capsys.readouterr().out.split())
    assert sum(map(len, rows.values())) == len(found.measurements) == 3 * len(rows)
    for level, (floats, int8, lost) in rows.items():
        assert [one.metric for one in (floats, int8, lost)] == ["knn_20/floats", "knn_20/int8", "knn_20/lost"]
        # The accuracy of the floats is the one that the run was measured with; two steps of a small model tell little.
        assert replace(floats, metric="knn_20", details={}) == replace(own[floats.name], details={})
        assert lost.value == pytest.approx(floats.value - int8.value)
        assert (lost.n, lost.n_train) == (60, 120)
        assert lost.low <= lost.value <= lost.high
        assert f"{level} {plus_minus(floats)} {plus_minus(int8)} {plus_minus(lost)}" in printed
    size = [found.about[f"bytes.{way}"] for way in ("floats", "int8")]
    assert size == [weight_bytes(model), weight_bytes(quantize_int8(model))]
    assert size[1] < 0.5 * size[0]
    assert f"{size[0]:,} -> {size[1]:,} bytes" in printed


def test_a_baseline_can_be_quantized(train, shards, capsys):
    pytest.importorskip("torchao")
    run = train("supervised", "recipe=supervised", "eval.at_end=false")
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

    def lost(other):
        found = [one.value for one in measure_quantization(model, other, config, train, test, torch.device("cpu"))]
        for floats, int8, difference in zip(found[::3], found[1::3], found[2::3], strict=True):
            assert difference == pytest.approx(floats - int8)
        return found[2::3]

    assert any(lost(broken))
    assert not any(lost(model))


@pytest.mark.slow
def test_loader_compares_all_that_are_installed(shards, tmp_path):
    # In a process of its own: webdataset leaves files open.
    options = ["--size", "32", "--images", "100", "--repeats", "2", "--json", str(tmp_path / "l.json")]
    command = [sys.executable, "-m", "hjepa_benchmark", "loader", f"{shards}/train-*.tar", *options]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=500, check=True).stdout
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
        (["probes", "nowhere"], "nowhere: there is no such folder"),
        (["probes", "nowhere", "--train", "x", "--eval", "y"], "nowhere: neither a path nor a timm model"),
        (["probes", ".", "--pretrained"], "--pretrained"),
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
        (["sweep", "run.seed=0,1", "run.train_time=5m", "run.steps=9"], "run.train_time=5m: measures how many steps"),
        (["sweep", "run.seed=0,1", "nonsense"], "'nonsense' is not a setting; write key=a,b"),
        (["throughput", "trainer.accumulate=2"], "trainer.accumulate=2"),
        (["throughput", "parallel=ddp"], "parallel=ddp"),
        (["probes", "nowhere", "--json", "no/rows.json"], "--json=no/rows.json"),
        (["sweep", "run.seed=0,1", "--out", "no/page.html"], "--out=no/page.html"),
        (["compare", "one", "two", "--json", "."], "--json=."),
        (["compare", "one", "two", "--json", "x", "--out", "./x"], "--json=x, --out=x: one file"),
        (["throughput", "--json", "x", "--turn", "x"], "--json=x, --turn=x: one file"),
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


def test_a_terminal_that_has_not_all_letters_is_told_them(monkeypatch):
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", shown)
    assert main(["compare", "one"]) == 2
    print("±", flush=True)
    assert shown.buffer.getvalue() == b"\\xb1\n"


def test_an_interruption_is_one_line(monkeypatch, tmp_path, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(probes, "probe_run", interrupted)
    assert main(["probes", str(tmp_path)]) == 130
    assert capsys.readouterr().err.strip().splitlines() == ["hjepa-benchmark: interrupted; what it had written stands"]


@pytest.mark.parametrize("command", ["probes", "suite=quick"])
def test_a_model_that_has_diverged_is_one_line_and_code_3(run, tmp_path, capsys, command):
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    model = load_pretrained(copied)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    model.save_pretrained(copied)
    assert main([command, str(copied)]) == 3
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("measuring:")]
    assert len(lines) == 1
    assert "the model has diverged" in lines[0]


def test_a_process_that_is_gone_is_one_line_and_an_error_of_the_program_its_traceback(monkeypatch, tmp_path, capsys):
    for error in (WorkerError("process 1 is gone"), RuntimeError("a bug")):
        monkeypatch.setattr(probes, "probe_run", lambda *_, error=error, **__: (_ for _ in ()).throw(error))
        if isinstance(error, WorkerError):
            assert main(["probes", str(tmp_path)]) == 1
            assert capsys.readouterr().err == "hjepa-benchmark: process 1 is gone\n"
        else:
            with pytest.raises(RuntimeError, match="a bug"):
                main(["probes", str(tmp_path)])


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
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert found.stdout.strip() == "False"
