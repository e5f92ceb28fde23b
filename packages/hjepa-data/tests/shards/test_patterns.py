from pathlib import Path

import pytest

from hjepa_data import DataError, ShardSource, expand_shards
from hjepa_data.shards.patterns import expand_locations


@pytest.fixture
def folder(tmp_path):
    for number in range(12):
        (tmp_path / f"train-{number:06d}.tar").write_bytes(b"")
    (tmp_path / "eval-0.tar").write_bytes(b"")
    (tmp_path / "notes.md").write_text("no shard")
    return tmp_path


def names(shards):
    return [shard.name for shard in shards]


def test_braces(folder):
    assert names(expand_shards(f"{folder}/train-{{000003..000005}}.tar")) == [f"train-00000{n}.tar" for n in (3, 4, 5)]
    assert names(expand_shards(f"{folder}/{{eval-0,train-000011}}.tar")) == ["eval-0.tar", "train-000011.tar"]
    assert len(expand_shards(f"{folder}/train-0000{{00..11}}.tar")) == 12
    assert len(expand_shards(f"{folder}/train-0000{{0,1}}{{0..1}}.tar")) == 4


def test_glob_directory_file_and_list(folder):
    assert len(expand_shards(f"{folder}/train-*.tar")) == 12
    assert len(expand_shards(folder)) == 13
    assert names(expand_shards(folder / "eval-0.tar")) == ["eval-0.tar"]
    assert names(expand_shards([folder / "eval-0.tar", f"{folder}/train-{{000000..000001}}.tar"]))[0] == "eval-0.tar"


def test_list_file_is_relative_to_itself(folder):
    (folder / "all.txt").write_text("# the small one\neval-0.tar\n\ntrain-{000000..000002}.tar\n")
    assert len(expand_shards(folder / "all.txt")) == 4


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("{folder}/gone.tar", ("no such shard", "holds 14 entries", "eval-0.tar")),
        ("{folder}/x-*.tar", ("no file matches", "holds 14 entries")),
        ("{folder}/no/such/x-*.tar", ("no file matches", "holds 14 entries")),
        ("{folder}/train-{{000010..000019}}.tar", ("8 of the 10 shards", "train-000012.tar")),
        ("{folder}/train-{{9..3}}.tar", ("no rising range",)),
        ("{folder}/train-{{abc}}.tar", ("no range",)),
        ("{folder}/empty", ("no *.tar in directory", "is empty")),
        ("{folder}/empty.txt", ("names no shard",)),
        ("pipe:curl http://x/a.tar", ("commands are not run",)),
        ("s3://bucket/a.tar", ("local files only",)),
        ("{folder}/a.tar.gz", ("compressed",)),
        ("", ("empty",)),
    ],
)
def test_problems_are_said_in_one_line(folder, pattern, words):
    (folder / "empty").mkdir() if "empty" in pattern and ".txt" not in pattern else None
    if pattern.endswith("empty.txt"):
        (folder / "empty.txt").write_text("# nothing\n")
    if pattern.endswith(".gz"):
        (folder / "a.tar.gz").write_bytes(b"")
    with pytest.raises(DataError) as caught:
        expand_shards(pattern.format(folder=folder))
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_a_shard_named_twice_is_refused(folder):
    with pytest.raises(DataError, match="named twice"):
        expand_shards([f"{folder}/eval-*.tar", f"{folder}/eval-0.tar"])


def test_no_patterns(folder):
    with pytest.raises(DataError, match="the list of patterns is empty"):
        expand_shards([])


@pytest.mark.parametrize(
    "pattern",
    [
        "pipe:touch {folder}/ran",
        "  pipe:touch {folder}/ran",
        "PIPE:touch {folder}/ran",
        "pipe :touch {folder}/ran",
        "touch {folder}/ran |",
        "| touch {folder}/ran",
        "{folder}/train-000000.tar|touch {folder}/ran",
        "$(touch {folder}/ran)",
        "{folder}/`touch {folder}/ran`.tar",
        "<(touch {folder}/ran)",
        "{{pipe:touch {folder}/ran,{folder}/train-000000.tar}}",
        "{{pipe:touch {folder}/r*n,x}}",
    ],
)
def test_commands_are_refused_and_not_run(folder, pattern):
    text = pattern.format(folder=folder)
    (folder / "list.txt").write_text(f"train-000000.tar\n{text}\n")
    for given in (text, [f"{folder}/train-000000.tar", text], Path(text), folder / "list.txt"):
        with pytest.raises(DataError, match="commands are not run") as caught:
            expand_shards(given)
        assert "\n" not in str(caught.value)
        with pytest.raises(DataError, match="commands are not run"):
            ShardSource(given)
    assert not (folder / "ran").exists()


def test_odd_names_that_exist_are_no_commands(folder):
    (folder / "a$(b)").mkdir()
    (folder / "a$(b)" / "x.tar").write_bytes(b"")
    assert names(expand_shards(folder / "a$(b)")) == ["x.tar"]


def test_a_list_file_that_names_itself(folder):
    (folder / "loop.txt").write_text("eval-0.tar\nloop.txt\n")
    with pytest.raises(DataError, match="names itself"):
        expand_shards(folder / "loop.txt")


def test_urls_stand_beside_files(folder):
    (folder / "all.txt").write_text("eval-0.tar\nhttps://host/a-{8..10}.tar?x=1\n# s3://no/c.tar\ns3://bucket/b.tar\n")
    remote = [f"https://host/a-{n}.tar?x=1" for n in (8, 9, 10)] + ["s3://bucket/b.tar"]
    assert expand_locations(folder / "all.txt") == [folder / "eval-0.tar", *remote]
    assert expand_locations(f"{{http://host/a.tar,{folder}/eval-0.tar}}") == [
        "http://host/a.tar",
        folder / "eval-0.tar",
    ]
    with pytest.raises(DataError, match=r"'https://host/a-\{8..10\}.tar\?.*local files only"):
        expand_shards(folder / "all.txt")
    with pytest.raises(DataError, match=r"shard 'http://host/a.tar\?...' is named twice") as caught:
        expand_locations(["http://host/a.tar?key=secret"] * 2)
    assert "secret" not in str(caught.value)
    with pytest.raises(DataError, match="a Path drops a slash of a URL"):
        expand_locations(Path("http://host/a.tar"))


@pytest.mark.parametrize("url", ["http://host/a.tar|touch x", "http://host/$(touch x).tar", "s3://b/{a,`touch x`}.tar"])
def test_commands_in_urls_are_refused(url):
    with pytest.raises(DataError, match="commands are not run"):
        expand_locations(url)


def test_a_directory_is_its_visible_tar_files(folder):
    (folder / "._train-000000.tar").write_bytes(b"what macOS leaves")
    assert len(expand_shards(folder)) == 13
    odd = folder / "odd[1]"
    odd.mkdir()
    (odd / "a.tar").write_bytes(b"")
    assert names(expand_shards(odd)) == ["a.tar"]
    (odd / "b.tar").mkdir()
    with pytest.raises(DataError, match=r"b.tar' is a directory, not a shard"):
        expand_shards(odd)


def test_a_glob_in_a_folder_whose_name_has_brackets(folder):
    inner = folder / "run [1]"
    inner.mkdir()
    for name in ("a-1.tar", "a-2.tar", "b.tar"):
        (inner / name).touch()
    assert names(expand_shards(f"{inner}/a-*.tar")) == ["a-1.tar", "a-2.tar"]


@pytest.mark.parametrize("name", ["run {d}", "run {1,2}"])
def test_braces_in_a_name_that_is_there_are_no_pattern(folder, name):
    inner = folder / name
    inner.mkdir()
    for shard in ("a-0.tar", "a-1.tar", "b{c}.tar"):
        (inner / shard).touch()
    assert names(expand_shards(inner)) == ["a-0.tar", "a-1.tar", "b{c}.tar"]
    assert names(expand_shards(inner / "b{c}.tar")) == ["b{c}.tar"]
    (folder / "all.txt").write_text(f"{name}/a-{{0..1}}.tar\n{name}/b*.tar\n")
    assert names(expand_shards(folder / "all.txt")) == ["a-0.tar", "a-1.tar", "b{c}.tar"]
    with pytest.raises(DataError, match=r"1 of the 2 shards .*, the first is '.*/a-2.tar'"):
        expand_shards(f"{inner}/a-{{1..2}}.tar")


def test_list_files_are_utf8(folder):
    (folder / "all.txt").write_bytes("\ufefftrain-000001.tar\r\n".encode())
    assert names(expand_shards(folder / "all.txt")) == ["train-000001.tar"]
    (folder / "all.txt").write_bytes(b"caf\xe9.tar\n")
    with pytest.raises(DataError, match=r"list file '.*all.txt' cannot be read: .*; write it in UTF-8"):
        expand_shards(folder / "all.txt")
