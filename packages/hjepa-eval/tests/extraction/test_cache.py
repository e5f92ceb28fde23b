import copy
import logging
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from hjepa_eval import CacheKey, FeatureCache, FeatureName, FeatureSet, files_hash, weights_hash

KEY = CacheKey(weights="a", data="b", transform="c", features="d")


def sets(scale=1.0):
    labels = torch.tensor([0, -1, 2])
    return {
        key: FeatureSet(
            values=scale * torch.randn(3, width, generator=torch.Generator().manual_seed(width)),
            labels=labels,
            name=FeatureName(branch="target", level=key, pooling="mean"),
        )
        for key, width in (("0", 4), ("1", 2))
    }


def test_what_is_kept_comes_back_bit_for_bit_and_is_computed_once(tmp_path):
    cache, calls = FeatureCache(tmp_path / "new"), []
    for _ in range(3):
        found = cache.get(KEY, lambda: calls.append(0) or sets())
        for key, expected in sets().items():
            assert torch.equal(found[key].values, expected.values)
            assert torch.equal(found[key].labels, expected.labels)
            assert found[key].name == expected.name
    assert len(calls) == 1
    assert [path.suffix for path in cache.folder.iterdir()] == [".safetensors"]


@pytest.mark.parametrize("field", ["weights", "data", "transform", "features"])
def test_every_word_of_the_key_makes_another_file(tmp_path, field):
    cache = FeatureCache(tmp_path)
    cache.write(KEY, sets())
    assert cache.read(replace(KEY, **{field: "other"})) is None
    other = cache.get(replace(KEY, **{field: "other"}), lambda: sets(2.0))
    assert torch.equal(other["0"].values, sets(2.0)["0"].values)


@pytest.mark.parametrize("damage", ["cut", "flip", "header", "empty", "renamed", "pickle"])
def test_a_damaged_file_is_named_and_made_again(tmp_path, caplog, damage):
    cache = FeatureCache(tmp_path)
    path = cache.write(KEY, sets())
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[:-5]
    elif damage == "flip":
        content[-3] ^= 1
    elif damage == "header":
        content[9] = 0
    elif damage == "empty":
        content = bytearray()
    elif damage == "renamed":
        content = bytearray(cache.write(replace(KEY, data="other"), sets(2.0)).read_bytes())
    path.write_bytes(content)
    if damage == "pickle":
        torch.save({"x": torch.zeros(1)}, path)
    with caplog.at_level(logging.WARNING):
        found = cache.get(KEY, sets)
    assert str(path) in caplog.text
    assert torch.equal(found["0"].values, sets()["0"].values)
    caplog.clear()
    assert cache.read(KEY) is not None
    assert not caplog.text


def test_a_writer_that_is_killed_leaves_nothing_that_is_read(tmp_path):
    """The process dies in the middle of the write, before the rename."""
    script = f"""
import os, torch
from pathlib import Path
from hjepa_eval import CacheKey, FeatureCache, FeatureSet
os.fsync = lambda fd: os._exit(9)
FeatureCache({str(tmp_path)!r}).write(
    CacheKey(weights="a", data="b", transform="c", features="d"),
    {{"0": FeatureSet(values=torch.zeros(3, 2), labels=torch.zeros(3, dtype=torch.int64))}},
)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 9
    assert len(os.listdir(tmp_path)) == 1
    assert FeatureCache(tmp_path).read(KEY) is None


def test_features_of_another_version_or_of_a_function_without_a_name_are_not_taken(tmp_path, monkeypatch):
    FeatureCache(tmp_path).write(KEY, sets())
    monkeypatch.setattr("hjepa_eval.extraction.cache.version", lambda name: f"{name} of tomorrow")
    assert FeatureCache(tmp_path).read(KEY) is None
    with pytest.raises(TypeError, match="features"):
        CacheKey(weights="a", data="b", transform="c")


def test_sets_of_other_samples_are_refused(tmp_path):
    mixed = sets()
    mixed["1"].labels = torch.tensor([1, 1, 1])
    with pytest.raises(ValueError, match="same samples"):
        FeatureCache(tmp_path).write(KEY, mixed)
    assert not list(tmp_path.iterdir())


def test_weights_hash_sees_every_bit_name_and_layer():
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    same = weights_hash(module)
    assert weights_hash(copy.deepcopy(module).train()) == same
    changed = copy.deepcopy(module)
    with torch.no_grad():
        changed[0].weight.view(-1)[0] += 1e-6
    buffer = copy.deepcopy(module)
    buffer[1].num_batches_tracked += 1
    other = nn.Sequential(*copy.deepcopy(module), nn.ReLU())
    assert len({same, weights_hash(changed), weights_hash(buffer), weights_hash(other)}) == 4
    assert weights_hash(copy.deepcopy(module).bfloat16()) != same


def test_files_hash_is_of_content_and_order(tmp_path):
    for name, text in (("a", "1"), ("b", "2")):
        (tmp_path / name).write_text(text)
    a, b = tmp_path / "a", tmp_path / "b"
    whole = files_hash([a, b])
    assert files_hash([b, a]) != whole
    assert files_hash([a, b], content=False) == files_hash([a, b], content=False) != whole
    b.write_text("3")
    assert files_hash([a, b]) != whole


class Normalised(nn.Module):
    """A buffer that no checkpoint holds, and a state that is no tensor."""

    def __init__(self, mean):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("mean", torch.tensor([mean]), persistent=False)

    def get_extra_state(self):
        return {"version": 1}

    def set_extra_state(self, state):
        pass


def test_weights_hash_sees_buffers_that_no_checkpoint_holds():
    first, other = Normalised(0.5), Normalised(0.4)
    other.layer.load_state_dict(first.layer.state_dict())
    assert weights_hash(first) == weights_hash(copy.deepcopy(first)) != weights_hash(other)


def test_features_are_not_lost_with_a_disk_that_is_full(tmp_path, caplog, monkeypatch):
    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with caplog.at_level(logging.WARNING):
        found = FeatureCache(tmp_path).get(KEY, sets)
    assert torch.equal(found["0"].values, sets()["0"].values)
    assert "No space left" in caplog.text
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_told_before_anything_is_computed(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        FeatureCache(tmp_path / "file").get(KEY, lambda: pytest.fail("computed"))


def test_features_that_cannot_be_written_are_returned_all_the_same(tmp_path, caplog):
    one = sets()["0"]
    with caplog.at_level(logging.WARNING):
        found = FeatureCache(tmp_path).get(KEY, lambda: {"0": one, "again": one})
    assert list(found) == ["0", "again"]
    assert "not written" in caplog.text
    assert "\n" not in caplog.messages[0]
    with pytest.raises(ValueError, match="there are none"):
        FeatureCache(tmp_path).write(KEY, {})
