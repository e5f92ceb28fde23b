"""The commands, on a tiny run."""

import json

import pytest
import torch

from hjepa_benchmark.cli import main
from hjepa_benchmark.quantize import measure_quantization
from hjepa_data import ShardSource
from hjepa_models import load_pretrained
from hjepa_models.quantization import quantize_int8, weight_bytes
from hjepa_pretrain import settings
from hjepa_pretrain.cli import main as pretrain
from hjepa_pretrain.demo import compose_demo
from hjepa_pretrain.demo.shards import write_demo_shards
from hjepa_pretrain.evaluation import load_pair, open_sources

TINY = (
    "model=vit_nano_patch8",
    "hjepa.encoder.embed_dim=32",
    "hjepa.encoder.num_heads=2",
    "hjepa.encoder.depth=1",
    "hjepa.predictor.embed_dim=16",
    "hjepa.predictor.num_heads=2",
    "hjepa.predictor.depth=1",
    "masks.num_targets=2",
    "data.image_size=[32,32]",
    "data.batch_size=16",
    "data.workers=0",
    "run.device=cpu",
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    for split, count in (("train", 120), ("eval", 60)):
        write_demo_shards(compose_demo(split, count, seed=3), folder, split)
    return folder


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    words = [f"run.dir={folder}", f"data.train={shards}/train-*.tar", f"data.eval={shards}/eval-*.tar", "run.steps=2"]
    assert pretrain([*words, *TINY, "eval.every_steps=null"]) == 0
    return folder


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
    assert {row["level"]: row["floats"] for row in found["rows"]} == measured
    assert all(row["drop"] == pytest.approx(100 * (row["floats"] - row["int8"])) for row in found["rows"])
    assert found["bytes"] == {"floats": weight_bytes(model), "int8": weight_bytes(quantize_int8(model))}
    assert found["bytes"]["int8"] < 0.5 * found["bytes"]["floats"]
    printed = " ".join(capsys.readouterr().out.split())
    for row in found["rows"]:
        assert f"{row['level']} {row['floats']:.3f} {row['int8']:.3f} {row['drop']:+.2f}" in printed
    assert f"{found['bytes']['floats']:,} -> {found['bytes']['int8']:,} bytes" in printed


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


def test_throughput_prints_a_speed(capsys):
    assert main(["throughput", "--steps", "4", *TINY]) == 0
    printed = capsys.readouterr().out
    assert "images/s" in printed
    assert "ms a step" in printed


def test_loader_prints_both_speeds(shards, capsys):
    options = ["--size", "32", "--images", "100", "--repeats", "1", "--workers", "0"]
    assert main(["loader", f"{shards}/train-*.tar", *options]) == 0
    printed = capsys.readouterr().out
    assert "loader" in printed
    assert "plain" in printed
    assert len(ShardSource(f"{shards}/train-*.tar")) == 120


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["probes", "nowhere"], "nowhere"),
        (["quantize", "nowhere"], "nowhere"),
        (["loader", "nowhere.tar"], "nowhere.tar"),
        (["throughput", "run.stpes=2"], "run.steps"),
    ],
)
def test_wrong_input_is_one_line_and_code_2(arguments, expected, capsys):
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert expected in message
    assert len(message.strip().splitlines()) == 1
