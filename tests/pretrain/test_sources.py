"""What `data.train` may name: shards, a folder of images, several of them with weights."""

import json
import shutil

import pytest
from PIL import Image

from hjepa_data import DataError, MixtureSource, ShardSource
from hjepa_pretrain import settings
from hjepa_pretrain.demo import CLASS_NAMES
from hjepa_pretrain.evaluation import class_names, load_pair, open_pair, open_sources
from hjepa_pretrain.results import measured_before


@pytest.fixture
def folder(shards, tmp_path):
    """The images of the shards in folders of classes."""
    source = ShardSource(f"{shards}/train-*.tar")
    for number in range(60):
        sample = source.read(number)
        target = tmp_path / "photos" / f"class{sample.label}"
        target.mkdir(parents=True, exist_ok=True)
        (target / f"{number}.webp").write_bytes(sample.image)
    return tmp_path / "photos"


def test_a_folder_of_images_trains(pretrain, tiny, folder, tmp_path, capsys, read_losses):
    words = (*tiny, f"data.train={folder}", f"data.eval={folder}", "run.steps=2")
    finished = pretrain.here(capsys, f"run.dir={tmp_path}/run", *words)
    assert finished.code == 0, finished.err
    assert "on 60 images" in finished.out
    assert len(read_losses(tmp_path / "run")) == 2


def test_a_mixture_has_its_shares_and_resumes(pretrain, tiny, folder, shards, tmp_path, capsys, read_losses):
    run = f"run.dir={tmp_path}/run"
    words = (*tiny, f"data.train={shards}/train-*.tar + {folder}", "data.weights=[1,3]", "eval.at_end=false")
    assert pretrain.here(capsys, run, *words, "run.steps=2").code == 0
    assert pretrain.here(capsys, run, "run.steps=3").code == 0
    assert [step for step, _ in read_losses(tmp_path / "run")] == [1, 2, 3]
    source = open_sources(settings.load([run])[0])[0]
    assert isinstance(source, MixtureSource)
    assert list(source.shares / source.shares.sum()) == [0.25, 0.75]


def test_several_are_measured_on_and_their_classes_have_names(pretrain, tiny, folder, shards, tmp_path):
    names = [f"name {number}" for number in range(10)]
    config, _ = settings.load([*tiny, f"data.eval={shards}/eval-000000.tar + {folder}"])
    sources = open_sources(config)
    assert len(sources[1]) == 60 + 60
    known = sorted(path.name for path in folder.iterdir())
    assert class_names(sources[1]) == known
    images = load_pair(config, sources, 20, 20)[1]
    assert (images.class_name(0), images.class_name(99)) == (known[0], "99")
    for number, shard in enumerate(("train-000000.tar", "eval-000000.tar")):
        (tmp_path / str(number)).mkdir()
        shutil.copy(shards / shard, tmp_path / str(number))
        (tmp_path / str(number) / "classes.json").write_text(json.dumps(names))
    config.data.train, config.data.eval = f"{tmp_path}/0", f"{tmp_path}/1"
    assert class_names(open_sources(config)[0]) == names
    (tmp_path / "1" / "classes.json").write_text(json.dumps(names[::-1]))
    with pytest.raises(DataError, match="number classes differently"):
        open_sources(config)
    config.data.train = config.data.eval = None
    assert load_pair(config, sources, 1, 1)[0].classes == CLASS_NAMES


def test_a_folder_with_the_mark_of_a_mixture_in_its_name(folder, shards, tmp_path):
    odd = folder.rename(tmp_path / "my + photos")
    more = tmp_path / "more + shards {d}"
    more.mkdir()
    shutil.copy(shards / "train-000000.tar", more)
    size = len(ShardSource(more))
    for text, count in (
        (f"{odd}", 60), (f"{more}/train-000000.tar", size), (f"{more}/train-{{000000..000000}}.tar", size),
        (f"{more} + {odd}", size + 60), (f"{odd} + {more}/*.tar", size + 60),
    ):  # fmt: skip
        assert len(open_pair(text, None)[0]) == count
    with pytest.raises(DataError, match="no such shard 'none'"):
        open_pair("none + there", None)


def test_images_that_are_in_both_are_named_however_they_are_written(shards, caplog):
    train, held_out = f"{shards}/train-*.tar", f"{shards}/eval-*.tar"
    open_pair(train, held_out)
    assert "find themselves" not in caplog.text
    for everything in (f"{train} + {held_out}", f"{shards}/*.tar", str(shards)):
        caplog.clear()
        open_pair(everything, f"{shards}/./eval-*.tar")
        assert "find themselves" in caplog.text


def test_wrong_sources(pretrain, tiny, shards, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "lone.png")
    for train, words in (
        (f"{tmp_path}/empty", ["neither shards", "images"]),
        (f"{shards}/train-*.tar + {tmp_path}/empty", ["neither shards"]),
        ("torchvision:CIFAR10", ["torchvision:CLASS:ROOT"]),
    ):
        finished = pretrain.here(capsys, f"run.dir={tmp_path}/run", *tiny, f"data.train={train}")
        assert finished.code == 2, finished.err
        assert all(word in finished.message for word in words), finished.message
    finished = pretrain.here(capsys, f"run.dir={tmp_path}/run", *tiny, "data.weights=[1,2]")
    assert finished.code == 2
    assert "weights" in finished.message


def test_local_views_join_the_global_level(pretrain, tiny, tmp_path, capsys, read_losses):
    words = ("recipe=lejepa", "data.views=2", "data.local_views=2", "data.local_size=[16,16]", "run.steps=2")
    finished = pretrain.here(capsys, f"run.dir={tmp_path}/run", *tiny, *words, "eval.at_end=false")
    assert finished.code == 0, finished.err
    config, _ = settings.load([f"run.dir={tmp_path}/run"])
    views = config.data.stream(1).views
    assert [(group.count, group.size) for group in views] == [(2, (32, 32)), (2, (16, 16))]
    assert len(read_losses(tmp_path / "run")) == 2


def test_the_policy_for_unreadable_shards_reaches_the_stream(pretrain, tiny, tmp_path, capsys):
    finished = pretrain.here(capsys, f"run.dir={tmp_path}/run", *tiny, "data.unreadable=perhaps")
    assert finished.code == 2
    assert "stop, skip" in finished.message
    assert settings.load([*tiny, "data.unreadable=skip"])[0].data.stream(1).unreadable == "skip"


def test_classes_that_are_numbered_differently_are_refused(pretrain, tiny, folder, tmp_path, capsys):
    other = tmp_path / "others" / "zebra"
    other.mkdir(parents=True)
    Image.new("RGB", (40, 40)).save(other / "1.png")
    for words in ((f"data.eval={other.parent}",), (f"data.train={folder} + {other.parent}",)):
        finished = pretrain.here(capsys, f"run.dir={tmp_path}/run", *tiny, f"data.train={folder}", *words)
        assert finished.code == 2
        assert "number classes differently" in finished.message


def test_another_eval_set_is_measured_anew(pretrain, tiny, shards, tmp_path, capsys):
    run, results = f"run.dir={tmp_path}/run", tmp_path / "run" / "results.json"
    assert pretrain.here(capsys, run, *tiny, "run.steps=1", "data.eval=null").code == 0
    assert json.loads(results.read_text())["measurements"] == []
    words = (f"data.eval={shards}/eval-*.tar", "data.max_skipped_fraction=0.05", "data.unreadable=skip")
    assert pretrain.here(capsys, run, *words).code == 0
    assert json.loads(results.read_text())["measurements"]
    config = settings.load([run])[0]
    assert measured_before(config, 1, results.parent) is not None
    assert measured_before(config, 2, results.parent) is None
    results.write_text('{"step": 1, ')
    assert measured_before(config, 1, results.parent) is None
