"""The commands, on a tiny run."""

import json

import pytest

from hjepa_benchmark.cli import main
from hjepa_data import ShardSource
from hjepa_pretrain.cli import main as pretrain
from hjepa_pretrain.demo import compose_demo
from hjepa_pretrain.demo.shards import write_demo_shards

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


def test_probes_of_a_run(shards, tmp_path, capsys):
    run = tmp_path / "run"
    words = [f"run.dir={run}", f"data.train={shards}/train-*.tar", f"data.eval={shards}/eval-*.tar", "run.steps=2"]
    assert pretrain([*words, *TINY, "eval.every_steps=null"]) == 0
    capsys.readouterr()
    assert main(["probes", str(run), "--json", str(tmp_path / "rows.json")]) == 0
    assert "untrained" in capsys.readouterr().out
    again, first = (json.loads(path.read_text())["rows"] for path in (tmp_path / "rows.json", run / "results.json"))
    assert again == first


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
        (["loader", "nowhere.tar"], "nowhere.tar"),
        (["throughput", "run.stpes=2"], "run.steps"),
    ],
)
def test_wrong_input_is_one_line_and_code_2(arguments, expected, capsys):
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert expected in message
    assert len(message.strip().splitlines()) == 1
