import errno
import json
import logging
import resource
import shutil

import pytest
import torch

from hjepa_train import CheckpointConfig, CheckpointError, CheckpointStore, World
from hjepa_train.checkpoint import files
from hjepa_train.checkpoint import store as store_module
from hjepa_train.checkpoint.files import DamagedError, read_manifest
from hjepa_train.checkpoint.parts import Part
from hjepa_train.checkpoint.tensors import write_tensors

MODEL = {"weight": [4, 3]}


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "checkpoints")


def save(store, step, size=4):
    parts = {"model/weight": Part(offsets=(0, 0), values=torch.full((size, 3), float(step)))}
    return store.save(step, parts, {"step": step, "stream": {"position": step}}, {"weight": [size, 3]})


def no_space(*_arguments):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_checkpoint_comes_back_as_it_was(store):
    path = save(store, 7)
    assert path.name == "step_00000007"
    assert (store.folder / "latest").read_text() == "step_00000007\n"
    newest = store.newest()
    assert newest.state == {"step": 7, "stream": {"position": 7}}
    assert newest.model == MODEL
    assert torch.equal(newest.tensors()["model/weight"], torch.full((4, 3), 7.0))
    assert list(newest.tensors()) == ["model/weight"]


def test_an_empty_folder_has_no_checkpoint(store):
    assert store.newest() is None


def test_only_the_newest_stay(store):
    for step in (1, 2, 3, 10):
        save(store, step)
    assert [path.name for path in store.paths()] == ["step_00000010", "step_00000003"]
    store.keep = None
    save(store, 11)
    assert len(store.paths()) == 3


def corrupt_size(path):
    with (path / "rank_00000.safetensors").open("r+b") as file:
        file.truncate(20)


def corrupt_bit(path):
    content = bytearray((path / "rank_00000.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "rank_00000.safetensors").write_bytes(content)


def corrupt_json(path):
    (path / "manifest.json").write_text((path / "manifest.json").read_text()[:30])


def corrupt_fields(path):
    (path / "manifest.json").write_text('{"format": 1}')


def corrupt_entry(path):
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"files": {"state.json": 7}}))


def corrupt_format(path):
    (path / "manifest.json").write_text("[]")


def lose_file(path):
    (path / "state.json").unlink()


def lose_manifest(path):
    (path / "manifest.json").unlink()


def lose_rank(path):
    (path / "rank_00000.safetensors").unlink()


def put_another_file(path):
    """A file that was not written by this run: a whole one of the same size."""
    name = path / "rank_00000.safetensors"
    name.unlink()
    write_tensors(name, {"model/weight": Part(offsets=(0, 0), values=torch.full((4, 3), -1.0))})


def put_a_foreign_directory(path):
    shutil.rmtree(path)
    path.mkdir()
    (path / ".metadata").write_bytes(b"\x80\x04N.")
    (path / "__0_0.distcp").write_bytes(b"another program's")


def older_format(path):
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"format": 1}))


OTHERS = [lose_rank, put_another_file, put_a_foreign_directory, older_format]
DAMAGES = [
    *OTHERS, corrupt_size, corrupt_bit, corrupt_json, corrupt_fields, corrupt_entry, corrupt_format, lose_file,
    lose_manifest,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(damage, store, caplog):
    save(store, 1)
    damage(save(store, 2))
    with caplog.at_level(logging.WARNING):
        assert store.newest().state["step"] == 1
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "step_00000002 is damaged" in caplog.text


def test_a_damaged_checkpoint_keeps_no_place_from_a_whole_one(store):
    save(store, 1)
    corrupt_bit(save(store, 2))
    assert store.newest().state["step"] == 1
    save(store, 3)
    assert [path.name[-1:] for path in store.paths()] == ["3", "2", "1"]
    corrupt_bit(store.folder / "step_00000003")
    assert store.newest().state["step"] == 1
    save(store, 4)
    save(store, 5)
    assert [path.name[-1:] for path in store.paths()] == ["5", "4"]


def test_a_damaged_checkpoint_is_not_called_whole(store, monkeypatch):
    save(store, 1)
    corrupt_bit(save(store, 2))
    store.newest()
    monkeypatch.setattr(store_module, "write_tensors", no_space)
    with pytest.raises(CheckpointError, match="newest checkpoint that is whole: step_00000001; make room"):
        save(store, 3)


def test_what_does_not_read_as_it_was_written_is_no_checkpoint(store, monkeypatch):
    save(store, 1)

    def flipped(path, parts):
        written = write_tensors(path, parts)
        corrupt_bit(path.parent)
        return written

    monkeypatch.setattr(store_module, "write_tensors", flipped)
    with pytest.raises(CheckpointError, match=r"rank_00000.safetensors does not read as it was written.*step_00000001"):
        save(store, 2)
    assert [path.name for path in store.paths()] == ["step_00000001"]


def test_a_tensor_that_nobody_wrote_is_missed(store):
    save(store, 1)
    parts = {"model/weight": Part(offsets=(0, 0), values=torch.zeros(4, 3))}
    with pytest.raises(CheckpointError, match=r"1 tensors of the model were not written \(bias\)"):
        store.save(2, parts, {"step": 2}, MODEL | {"bias": [4]})
    assert [path.name for path in store.paths()] == ["step_00000001"]


def test_a_run_never_starts_again_in_silence(store):
    corrupt_bit(save(store, 1))
    with pytest.raises(CheckpointError, match="all 1 checkpoints are damaged; remove the folder"):
        store.newest()


def test_a_damaged_checkpoint_is_written_again(store):
    save(store, 1)
    corrupt_bit(save(store, 2))
    save(store, 2)
    assert store.newest().state["step"] == 2
    assert not list(store.folder.glob(".tmp-*"))


def test_what_an_interrupted_save_left_is_no_checkpoint_and_goes(store):
    save(store, 1)
    leftover = store.folder / ".tmp-step_00000002"
    leftover.mkdir()
    (leftover / "rank_00000.safetensors").write_bytes(b"half")
    assert store.newest().state["step"] == 1
    save(store, 3)
    assert not leftover.exists()


def test_a_full_disk_leaves_the_previous_checkpoint(store):
    """The kernel refuses to let a file grow: the real writer meets a real error."""
    save(store, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(
            CheckpointError, match="newest checkpoint that is whole: step_00000001; make room"
        ) as caught:
            save(store, 2, size=100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in store.folder.iterdir()) == ["latest", "step_00000001"]
    assert store.newest().state["step"] == 1
    assert (store.folder / "latest").read_text() == "step_00000001\n"
    save(store, 2)
    assert store.newest().state["step"] == 2


@pytest.mark.parametrize("stage", ["write_json", "write_manifest"])
def test_a_disk_that_fills_at_a_later_stage(stage, store, monkeypatch):
    save(store, 1)
    with monkeypatch.context() as patched:
        patched.setattr(store_module, stage, no_space)
        with pytest.raises(CheckpointError, match="No space left on device"):
            save(store, 2)
    assert store.newest().state["step"] in (1, 2)
    assert not list(store.folder.glob(".tmp-*"))
    assert (store.folder / "step_00000001").is_dir()


def test_another_model_is_named(store):
    save(store, 1)
    checkpoint = store.newest()
    checkpoint.check_model({"weight": [4, 3]})
    with pytest.raises(CheckpointError) as caught:
        checkpoint.check_model({"weight": [4, 5]} | {f"extra.{i}": [1] for i in range(5)})
    message = str(caught.value)
    assert "5 missing (extra.0, extra.1, extra.2, ...)" in message
    assert "1 of another shape (weight [4, 3] saved, [4, 5] here)" in message
    assert "use another run directory" in message
    assert "\n" not in message
    with pytest.raises(CheckpointError, match=r"1 missing \(other\); 1 unexpected \(weight\)"):
        checkpoint.check_model({"other": [4, 3]})


def test_the_manifest_tells_every_file(store):
    path = save(store, 1)
    manifest = read_manifest(path, verify=True)
    assert manifest == json.loads((path / "manifest.json").read_text())
    assert set(manifest["files"]) == {"state.json", "rank_00000.safetensors"}
    corrupt_bit(path)
    read_manifest(path, verify=False)
    with pytest.raises(DamagedError, match="another SHA-256"):
        read_manifest(path, verify=True)


def test_a_rank_that_does_not_see_the_folder_says_so(store):
    with pytest.raises(CheckpointError, match="must be shared by all ranks"):
        store.at(5)


def test_a_rank_that_cannot_write_into_the_folder_of_the_main_one_says_so(store):
    class Other(World):
        def any(self, *flags):
            return flags

        def gather(self, tensor):
            return tensor

    with pytest.raises(CheckpointError, match="another run directory, which all ranks have to share, then"):
        store.save(5, {}, {"step": 5}, MODEL, Other(rank=1, size=2))


@pytest.mark.parametrize(
    "fields", [{"every_steps": 0}, {"every_minutes": -1.0}, {"every_minutes": float("nan")}, {"keep": 0}]
)
def test_a_wrong_cadence_is_refused(fields):
    with pytest.raises(ValueError, match="not positive"):
        CheckpointConfig(**fields)


def test_a_checkpoint_that_the_disk_cannot_read_is_skipped(tmp_path, monkeypatch, caplog):
    store = CheckpointStore(tmp_path, keep=None)
    for step in (1, 2):
        save(store, step)
    real = files.describe

    def broken(path):
        if "step_00000002" in str(path):
            raise OSError(errno.EIO, "Input/output error")
        return real(path)

    monkeypatch.setattr(files, "describe", broken)
    found = store.newest()
    assert found is not None
    assert found.state["step"] == 1
    assert "cannot be read" in caplog.text


def test_a_whole_checkpoint_counts_though_the_folder_cannot_be_put_in_order(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(store_module, "replace_text", no_space)
    store = CheckpointStore(tmp_path, keep=1)
    save(store, 2)
    assert "is saved" in caplog.text
    assert store.newest() is not None
