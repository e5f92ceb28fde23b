"""The command as people run it: another process, real folders, what it prints and its exit code."""

import json
import os
import re
import subprocess
import sys

import pytest
from PIL import Image

from hjepa_data import FolderSource, ShardSource
from hjepa_data.shards.cli import main


def run(*arguments):
    environment = {**os.environ, "COLUMNS": "160", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "hjepa_data.shards.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
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
    sizes = ShardSource(tmp_path / "out").group_sizes
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
    errors = said[said.index("hjepa-shards:") :]
    assert errors.count("\n") == 1
    assert printed == ""


def test_wrong_flag(capsys):
    assert main(["a", "b", "--shard-size", "many"]) == 2
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


def test_shards_of_another_split_do_not_stay_beside_new_ones(classes, tmp_path, capsys):
    out = tmp_path / "shards"
    assert call(capsys, "make", classes, out, "--val-fraction", 0.3)[0] == 0
    before = sorted(path.name for path in out.iterdir())
    code, _, error = call(capsys, "make", classes, out, "--overwrite")
    assert code == 2
    assert "val-000000.tar" in error
    assert sorted(path.name for path in out.iterdir()) == before


def test_names_that_are_no_utf8_stay_apart(tmp_path, capsys, jpeg):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in (b"\xe8.jpg", b"\xe9.jpg"):
        (folder / os.fsdecode(name)).write_bytes(jpeg(1))
    assert call(capsys, "make", folder, tmp_path / "shards")[0] == 0
    assert len(ShardSource(tmp_path / "shards")) == 2


def test_classes_that_are_no_utf8_are_listed_as_text(tmp_path, capsys, jpeg):
    for name in (b"K\xe4fer", "Blüte".encode()):
        folder = tmp_path / "photos" / os.fsdecode(name)
        folder.mkdir(parents=True)
        (folder / "1.jpg").write_bytes(jpeg(1))
    assert FolderSource(tmp_path / "photos").classes == ["Blüte", "K\\xe4fer"]
    out = tmp_path / "shards"
    assert call(capsys, "make", tmp_path / "photos", out)[0] == 0
    assert json.loads((out / "classes.json").read_text(encoding="utf-8")) == ["Blüte", "K\\xe4fer"]
    assert sorted(ShardSource(out).labels.tolist()) == [0, 1]
    assert call(capsys, "show", out, "--out", tmp_path / "sheet.html")[0] == 0


@pytest.mark.parametrize("name", ["käse", "猫"])
def test_a_terminal_that_has_not_all_letters_is_told_them(tmp_path, jpeg, monkeypatch, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "ö.jpg").write_bytes(jpeg(1))
    for variable, value in (("LC_ALL", "C"), ("PYTHONUTF8", "0"), ("PYTHONCOERCECLOCALE", "0")):
        monkeypatch.setenv(variable, value)
    made = run(tmp_path, tmp_path / "out", "--workers", 1)
    assert made.returncode == 0, made.stderr
    assert f"1 class ({name.encode('ascii', 'backslashreplace').decode()})" in made.stdout
    assert json.loads((tmp_path / "out" / "classes.json").read_text(encoding="utf-8")) == [name]
    shown = run("show", tmp_path / "out", "--out", tmp_path / "sheet.html")
    assert shown.returncode == 0, shown.stderr
    assert name in (tmp_path / "sheet.html").read_text(encoding="utf-8")


def test_make_is_the_name_of_the_old_form(classes, tmp_path, capsys):
    assert call(capsys, classes, tmp_path / "old", "--workers", 1)[0] == 0
    assert call(capsys, "make", classes, tmp_path / "new", "--workers", 1)[0] == 0
    files = [
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir() if path.suffix == ".tar"}
        for name in ("old", "new")
    ]
    assert files[0] == files[1]
    assert list(files[0]) == ["train-000000.tar"]


@pytest.mark.parametrize("options", [[], ["--resize", 24, "--encode", "webp", "--val-fraction", 0.3]])
def test_one_and_three_processes_write_the_same_bytes(classes, tmp_path, capsys, options):
    results = []
    for workers in (1, 3):
        out = tmp_path / f"out{workers}"
        assert call(capsys, "make", classes, out, "--samples-per-shard", 7, "--workers", workers, *options)[0] == 0
        results.append({path.name: path.read_bytes() for path in out.iterdir() if "index" not in path.name})
    assert results[0] == results[1]
    assert len(results[0]) >= 6


def test_a_new_file_moves_no_other_between_train_and_val(classes, tmp_path, capsys, jpeg):
    assert call(capsys, "make", classes, tmp_path / "a", "--val-fraction", 0.3)[0] == 0
    (classes / "cat" / "new.jpg").write_bytes(jpeg(1000))
    assert call(capsys, "make", classes, tmp_path / "b", "--val-fraction", 0.3)[0] == 0
    for split in ("train", "val"):
        before, after = (content(f"{tmp_path}/{name}/{split}-*.tar") for name in "ab")
        assert [sample for sample in after if sample[0] != jpeg(1000)] == before


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_encode(flat, tmp_path, capsys, kind):
    import io

    from PIL import Image

    assert call(capsys, "make", flat, tmp_path / "out", "--encode", kind, "--quality", 80)[0] == 0
    images = [Image.open(io.BytesIO(image)) for image, _ in content(tmp_path / "out")]
    assert len(images) == 22
    assert {image.format for image in images} == {kind.upper()}


@pytest.fixture
def made(classes, tmp_path, capsys):
    assert call(capsys, "make", classes, tmp_path / "out", "--samples-per-shard", 10, "--workers", 1)[0] == 0
    return tmp_path / "out"


def test_index(made, capsys):
    for path in made.glob("*.index.json"):
        path.unlink()
    code, printed, _ = call(capsys, "index", made, "--workers", 2)
    assert code == 0
    assert re.findall(r"\d+", printed.splitlines()[3])[:3] == ["3", "30", "30"]
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in made.glob("*.index.json")}
    assert len(before) == 3
    assert call(capsys, "index", made)[0] == 0
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in made.glob("*.index.json")} == before
    shard = made / "train-000001.tar"
    os.truncate(shard, 5000)
    code, printed, _ = call(capsys, "index", made)
    assert code == 1
    assert printed.startswith(f"shard '{shard}' differs from the checksum of its index")
    code, printed, _ = call(capsys, "index", made, "--overwrite")
    assert code == 1
    assert "truncated at byte 5000" in printed.splitlines()[0]


def test_check(made, capsys):
    code, printed, said = call(capsys, "check", made)
    assert (code, said) == (0, "")
    assert "nothing damaged" in printed
    shard = made / "train-000001.tar"
    data = bytearray(shard.read_bytes())
    data[1700:1800] = bytes(100)
    shard.write_bytes(data)
    code, printed, said = call(capsys, "check", made / "train-000000.tar", shard)
    assert (code, said) == (1, "")
    lines = [line for line in printed.splitlines() if line.startswith(str(made))]
    assert len(lines) == 2
    assert lines[0].startswith(f"{shard}: (shard): has sha256 ")
    assert re.match(rf"{shard}: \w+/\d+\.jpg: ", lines[1])
    assert "damage in 1 of 2 shards" in printed


def test_check_in_a_process(made):
    (made / "train-000002.tar.index.json").unlink()
    os.truncate(made / "train-000000.tar", 0)
    result = run("check", f"{made}/train-{{000000..000002}}.tar", "--workers", 3)
    assert (result.returncode, result.stderr) == (1, "")
    assert "1 shard without checksums" in result.stdout
    assert "damage in 1 of 3 shards" in result.stdout


def test_show(made, tmp_path, capsys):
    for name in ("a.png", "b.html", "c.PNG"):
        code, printed, said = call(capsys, "show", f"{made}/*.tar", "--out", tmp_path / name, "--count", 9, "--seed", 2)
        assert (code, said) == (0, "")
        assert printed.strip() == f"{tmp_path / name}: 9 of 30 samples in 3 shards, seed 2"
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "c.PNG").read_bytes()
    page = (tmp_path / "b.html").read_text()
    assert page.count("<figure>") == 9
    assert "9 of 30 samples in 3 shards, drawn by seed 2" in page
    assert re.search(r"(cat \(0\)|dog \(1\)|emu \(2\))", page)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["make", "{tmp}/gone", "{tmp}/out"], "no such folder"),
        (["make", "{tmp}/good", "{tmp}/out", "--quality", "0"], "quality=0"),
        (["chekc", "{tmp}/out"], "did you mean 'check'?"),
        (["mak", "{tmp}/good", "{tmp}/out"], "did you mean 'make'?"),
        (["index", "{tmp}/gone"], "no such shard"),
        (["index", "{tmp}/good"], "no *.tar in directory"),
        (["index", "{tmp}/full", "--workers", "0"], "workers=0"),
        (["index", "pipe:cat {tmp}/full/train-000000.tar"], "commands are not run"),
        (["check", "{tmp}/gone-*.tar"], "no file matches"),
        (["check", "pipe:cat {tmp}/full/train-000000.tar"], "commands are not run"),
        (["check", "{tmp}/full", "{tmp}/full/train-000000.tar"], "named twice"),
        (["check", "{tmp}/full", "--max-pixels", "0"], "max_pixels=0"),
        (["check", "s3://bucket/a.tar"], "local files only"),
        (["show", "{tmp}/full", "--out", "{tmp}/a.png"], "truncated at byte 0"),
        (["show", "{tmp}/full", "--out", "{tmp}/a.gif"], "ends in .png or .html"),
        (["show", "{tmp}/full", "--out", "{tmp}/no/a.png"], "there is no folder"),
        (["show", "{tmp}/full", "--out", "{tmp}/a.png", "--count", "0"], "count=0"),
        (["show", "{tmp}/full", "--out", "{tmp}/a.png", "--seed", "-1"], "seed=-1"),
        (["show", "{tmp}/full", "--out", "{tmp}/a.png", "--classes", "{tmp}/none.json"], "none.json' cannot be read"),
        (["show", "pipe:cat x", "--out", "{tmp}/a.png"], "commands are not run"),
    ],
)
def test_wrong_input_of_the_commands_is_one_line_and_code_2(tmp_path, capsys, jpeg, arguments, words):
    for name in ("good", "full"):
        (tmp_path / name).mkdir()
    (tmp_path / "good" / "a.jpg").write_bytes(jpeg(0))
    (tmp_path / "full" / "train-000000.tar").write_bytes(b"")
    code, printed, said = call(capsys, *[argument.format(tmp=tmp_path) for argument in arguments])
    assert code == 2
    assert words in said
    assert said.startswith("hjepa-shards: ")
    assert said.count("\n") == 1
    assert printed == ""
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    "arguments", [[], ["index"], ["check"], ["show", "x"], ["make", "x"], ["check", "--what", "x"]]
)
def test_usage_errors_are_one_line(arguments, capsys):
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("hjepa-shards: ")
    assert said.count("\n") == 1
    assert "--help says more" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ("make SRC OUT", "index SHARDS", "check SHARDS", "show SHARDS", "short for", "exit codes", "examples:")),
        (["make"], ("layouts of SRC", "--val-fraction", "--encode", "whatever the number of workers", "examples:")),
        (["index"], ("SHARDS is", "sha256", "--overwrite", "a second run writes nothing", "examples:")),
        (["check"], ("SHARDS is", "shard: member: what", "exit code 1", "'pipe:'", "examples:")),
        (["show"], ("SHARDS is", "--seed", "classes.json", "no script", "examples:")),
    ],
)
def test_help_teaches(arguments, words, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*arguments, "--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in words), printed
    assert max(map(len, printed.splitlines())) <= 120


def test_a_killed_worker_is_one_line(made, monkeypatch, capsys):
    from hjepa_data.shards import check

    monkeypatch.setattr(check, "_check", lambda *_: os._exit(9))
    code, _, said = call(capsys, "check", made, "--workers", 2)
    assert code == 2
    assert "a worker process was killed" in said
    assert said.count("\n") == 1


def test_a_folder_with_the_name_of_a_command(tmp_path, capsys, monkeypatch, jpeg):
    (tmp_path / "check").mkdir()
    (tmp_path / "check" / "a.jpg").write_bytes(jpeg(0))
    monkeypatch.chdir(tmp_path)
    assert call(capsys, "./check", "out")[0] == 0
    assert len(ShardSource("out")) == 1


@pytest.fixture
def splits(tmp_path, jpeg):
    folder = tmp_path / "set"
    for split in ("train", "test", "val"):
        (folder / split / "cat").mkdir(parents=True)
        (folder / split / "cat" / "1.jpg").write_bytes(jpeg(1))
    return folder


def test_a_fraction_for_val_beside_splits_is_refused(splits, tmp_path, capsys):
    code, _, err = call(capsys, splits, tmp_path / "out", "--val-fraction", "0.5", "--workers", 1)
    assert code == 2
    assert "val_fraction=0.5: the images have the splits test, train, val, which are kept; allowed: 0" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("fraction", "split", "allowed"), [(0.01, "val", "at least"), (0.999, "train", "at most")])
def test_a_fraction_that_leaves_a_split_without_images_is_refused(classes, tmp_path, capsys, fraction, split, allowed):
    make = (classes, tmp_path / "out", "--workers", 1, "--val-fraction")
    code, _, err = call(capsys, *make, fraction)
    assert code == 2
    said = rf"val_fraction={fraction}: .* none of the 30 images into {split}; allowed: {allowed} (\S+) for"
    found = re.search(said, err)
    assert found, err
    assert not (tmp_path / "out").exists()
    assert call(capsys, *make, found[1])[0] == 0
    assert {path.name[:-11] for path in (tmp_path / "out").glob("*.tar")} == {"train", "val"}


def test_val_comes_before_test_in_the_next_command(splits, tmp_path, capsys):
    code, out, _ = call(capsys, splits, tmp_path / "out", "--workers", 1)
    assert code == 0
    assert re.search(r"data.train='\S*/train-000000.tar' data.eval='\S*/val-000000.tar'", out)


def test_overwrite_deletes_nothing_but_shards(flat, tmp_path, capsys):
    out = tmp_path / "out"
    assert call(capsys, flat, out, "--workers", 1)[0] == 0
    (out / "train-2024-backup.tar").write_bytes(b"precious")
    assert call(capsys, flat, out, "--workers", 1, "--overwrite")[0] == 0
    assert (out / "train-2024-backup.tar").read_bytes() == b"precious"


def test_names_of_classes_go_with_the_shards(classes, flat, tmp_path, capsys):
    out = tmp_path / "out"
    assert call(capsys, classes, out, "--workers", 1)[0] == 0
    assert (out / "classes.json").exists()
    assert call(capsys, flat, out, "--workers", 1, "--overwrite")[0] == 0
    assert not (out / "classes.json").exists()


def test_splits_of_other_classes_do_not_share_a_folder(classes, tmp_path, capsys):
    out = tmp_path / "out"
    assert call(capsys, f"torchvision:ImageFolder:{classes}", out, "--workers", 1)[0] == 0
    other = tmp_path / "other"
    (other / "test" / "cow").mkdir(parents=True)
    (classes / "cat" / "0.jpg").rename(other / "test" / "cow" / "0.jpg")
    code, _, err = call(capsys, other, out, "--workers", 1)
    assert code == 2
    assert "of a split with other classes" in err
    assert json.loads((out / "classes.json").read_text()) == ["cat", "dog", "emu"]


@pytest.mark.parametrize(("encoding", "side"), [("webp", 17_000), ("jpeg", 66_000)])
def test_what_a_format_cannot_hold_is_left_out(tmp_path, capsys, jpeg, encoding, side):
    folder = tmp_path / "wide"
    folder.mkdir()
    (folder / "good.jpg").write_bytes(jpeg(1))
    Image.new("RGB", (side, 2)).save(folder / "panorama.png")
    code, out, err = call(capsys, folder, tmp_path / "out", "--encode", encoding, "--workers", 1)
    assert code == 0, err
    assert re.search(r"too_large\s+│\s+1 │", out)
    assert len(ShardSource(tmp_path / "out")) == 1


def test_names_are_printed_as_they_are(tmp_path, capsys):
    name = r"a:dog:\[b] [red]x"
    code, _, err = call(capsys, "check", tmp_path / name)
    assert code == 2
    assert name in err
