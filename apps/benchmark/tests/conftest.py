"""Tiny runs on a small set of composites."""

import pytest

from hjepa_benchmark.cli import main as benchmark
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


@pytest.fixture(scope="session")
def tiny():
    return TINY


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    for split, count in (("train", 120), ("eval", 60)):
        write_demo_shards(compose_demo(split, count, seed=3), folder, split)
    return folder


@pytest.fixture(scope="session")
def train(shards, tmp_path_factory):
    """Trains a tiny run and returns its folder."""

    def make(name, *words):
        folder = tmp_path_factory.mktemp("runs") / name
        data = [f"data.train={shards}/train-*.tar", f"data.eval={shards}/eval-*.tar"]
        assert pretrain([f"run.dir={folder}", *data, "run.steps=2", *TINY, "eval.every_steps=null", *words]) == 0
        return folder

    return make


@pytest.fixture(scope="session")
def run(train):
    return train(
        "run",
        "recipe=hjepa",
        "hjepa.pyramid.levels=2",
        "hjepa.level_weights.weights=[1.0,0.7]",
        "trainer.learning_rate.value=0.05",
    )


@pytest.fixture(scope="session")
def measured(run):
    """The run, with the results of its quick suite."""
    assert benchmark(["suite=quick", str(run), "--corruption-images", "40"]) == 0
    return run
