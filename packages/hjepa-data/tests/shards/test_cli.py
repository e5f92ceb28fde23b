"""The command as people run it: another process, real folders, what it prints and its exit code."""

import json
import os
import subprocess
import sys

import pytest

from hjepa_data import ShardSource
from hjepa_data.shards.cli import main


def run(*arguments):
    environment = {**os.environ, "COLUMNS": "160", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "hjepa_data.shards.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        check=False,
    )


def call(capsys, *arguments):
    """The same in this process, which saves the start of Python."""
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def flat(tmp_path, jpeg):
    folder = tmp_path / "my photos"
    folder.mkdir()
    for number in range(20):
        (folder / f"photo {number}.v2.jpg").write_bytes(jpeg(number))
    (folder / "photo 3.v2.png").write_bytes(jpeg(99, kind="PNG"))
    (folder / "scan.bmp").write_bytes(jpeg(98, kind="BMP"))
    (folder / "nothing.jpg").write_bytes(b"")
    (folder / "broken.jpg").write_bytes(jpeg(1, size=(200, 200))[:-500])
    (folder / "text.jpg").write_text("not an image at all")
    (folder / "notes.txt").write_text("hello")
    (folder / ".hidden.jpg").write_bytes(jpeg(0))
    return folder


@pytest.fixture
def classes(tmp_path, jpeg):
    folder = tmp_path / "pets"
    for number in range(30):
        place = folder / ("cat", "dog", "emu")[number % 3]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.jpg").write_bytes(jpeg(number))
    return folder


def content(pattern):
    source = ShardSource(pattern)
    samples = [source.read(number) for number in range(len(source))]
    return sorted((sample.image, sample.label) for sample in samples)


def test_flat_folder_in_a_process(flat, tmp_path, jpeg):
    out = tmp_path / "out"
    result = run(flat, out, "--samples-per-shard", 8, "--workers", 2)
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in out.glob("*.tar")) == [f"train-{n:06d}.tar" for n in range(4)]
    source = ShardSource(out)
    assert len(source) == 22
    assert set(source.labels.tolist()) == {-1}
    images = {source.read(number).image for number in range(22)}
    assert {jpeg(n) for n in range(20)} | {jpeg(99, kind="PNG")} < images
    for words in (
        "5 files left out",
        "empty",
        "undecodable",
        "truncated",
        "not an image",
        "hidden",
        "no labels",
        f"hjepa-pretrain data.train='{out}/train-{{000000..000003}}.tar'",
    ):
        assert words in result.stdout, result.stdout
    assert "Traceback" not in result.stderr


def test_class_folders_and_validation_split(classes, tmp_path, capsys, jpeg):
    out = tmp_path / "out"
    code, printed, _ = call(capsys, classes, out, "--val-fraction", 0.3, "--workers", 1)
    assert code == 0
    assert json.loads((out / "classes.json").read_text()) == ["cat", "dog", "emu"]
    train, val = content(f"{out}/train-*.tar"), content(f"{out}/val-*.tar")
    assert sorted(train + val) == sorted((jpeg(n), n % 3) for n in range(30))
    assert 3 <= len(val) <= 16
    assert "3 classes (cat, dog, emu)" in printed
    assert "nothing left out" in printed
    assert f"data.train='{out}/train-000000.tar' data.eval='{out}/val-000000.tar'" in " ".join(printed.split())


def test_folders_of_splits(tmp_path, capsys, jpeg):
    for number in range(12):
        place = tmp_path / "set" / ("test" if number < 4 else "train") / ("a" if number % 2 else "b")
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.jpg").write_bytes(jpeg(number))
    code, _, _ = call(capsys, tmp_path / "set", tmp_path / "out", "--workers", 1)
    assert code == 0
    assert content(f"{tmp_path}/out/train-*.tar") == sorted((jpeg(n), 1 - n % 2) for n in range(4, 12))
    assert content(f"{tmp_path}/out/test-*.tar") == sorted((jpeg(n), 1 - n % 2) for n in range(4))


def test_workers_write_the_same_shards(classes, tmp_path, capsys):
    results = []
    for workers in (1, 3):
        out = tmp_path / f"out{workers}"
        assert call(capsys, classes, out, "--samples-per-shard", 7, "--workers", workers)[0] == 0
        results.append({path.name: path.read_bytes() for path in out.glob("*.tar")})
    assert len(results[0]) == 5
    assert results[0] == results[1]


def test_resize_shrinks_larger_images_only(tmp_path, capsys, jpeg):
    import io

    from PIL import Image

    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "large.jpg").write_bytes(jpeg(0, size=(200, 300)))
    (folder / "small.jpg").write_bytes(jpeg(1, size=(40, 50)))
    assert call(capsys, folder, tmp_path / "out", "--resize", 100)[0] == 0
    source = ShardSource(tmp_path / "out")
    sizes = sorted(Image.open(io.BytesIO(source.read(n).image)).size for n in range(2))
    assert sizes == [(50, 40), (150, 100)]


def test_shards_of_a_size_are_equal(tmp_path, capsys, jpeg):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number}.jpg").write_bytes(jpeg(number))
    assert call(capsys, folder, tmp_path / "out", "--shard-size", "15K")[0] == 0
    sizes = ShardSource(tmp_path / "out").shard_sizes
    assert len(sizes) > 2
    assert max(sizes) - min(sizes) <= 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{tmp}/gone", "{tmp}/out"], "no such folder"),
        (["{tmp}/file", "{tmp}/out"], "it is a file"),
        (["{tmp}/empty", "{tmp}/out"], "it is empty"),
        (["{tmp}/texts", "{tmp}/out"], "1 not an image"),
        (["{tmp}/damaged", "{tmp}/out"], "every image is damaged: 1 empty"),
        (["{tmp}/good", "{tmp}/full"], "holds shards already"),
        (["{tmp}/good", "{tmp}/out", "--val-fraction", "1.5"], "val_fraction=1.5"),
        (["{tmp}/good", "{tmp}/out", "--samples-per-shard", "0"], "samples_per_shard=0"),
        (["{tmp}/good", "{tmp}/out", "--labels", "folders"], "outside of class folders"),
        (["{tmp}/good", "{tmp}/file/out"], "Not a directory"),
    ],
)
def test_wrong_input_is_one_line_and_code_2(tmp_path, capsys, jpeg, arguments, words):
    for name in ("empty", "texts", "damaged", "good", "full"):
        (tmp_path / name).mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "texts" / "a.txt").write_text("")
    (tmp_path / "damaged" / "a.jpg").write_bytes(b"")
    (tmp_path / "good" / "a.jpg").write_bytes(jpeg(0))
    (tmp_path / "full" / "train-000000.tar").write_bytes(b"")
    code, printed, said = call(capsys, *[argument.format(tmp=tmp_path) for argument in arguments])
    assert code == 2
    assert words in said
    errors = said[said.index("error:") :]
    assert errors.count("\n") == 1
    assert printed == ""


def test_wrong_flag(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["a", "b", "--shard-size", "many"])
    assert caught.value.code == 2
    assert "allowed: such as 256M" in capsys.readouterr().err


def test_wrong_input_in_a_process(tmp_path):
    result = run(tmp_path / "gone", tmp_path / "out")
    assert result.returncode == 2
    assert "no such folder" in result.stderr
    assert "Traceback" not in result.stderr


def test_overwrite_replaces_all_old_shards(classes, tmp_path, capsys):
    out = tmp_path / "out"
    assert call(capsys, classes, out, "--samples-per-shard", 5)[0] == 0
    assert call(capsys, classes, out, "--samples-per-shard", 20, "--overwrite")[0] == 0
    assert len(list(out.glob("*.tar"))) == len(list(out.glob("*.index.json"))) == 2
    assert len(ShardSource(out)) == 30
