import itertools
import math
import os
import pickle
from pathlib import Path

import pytest
import torch

from hjepa_data import DataError, DevicePrefetcher, ViewGroup
from hjepa_data.stream.order import permutation
from hjepa_video import ClipStreamConfig, list_clips
from hjepa_video.testing import write_moving_clip


def config(**changes):
    values = {"global_batch_size": 2, "frames": 4, "fps": 8.0, "view": ViewGroup(size=(32, 32))}
    return ClipStreamConfig(**{**values, **changes})


def same(a, b):
    return torch.equal(a.views[0], b.views[0]) and torch.equal(a.sample, b.sample) and torch.equal(a.epoch, b.epoch)


def test_a_batch_is_clips_with_their_numbers(folder):
    stream = config().build(list_clips(folder), seed=0)
    batches = [next(stream) for _ in range(3)]
    assert batches[0].views[0].shape == (2, 3, 4, 32, 32)
    assert batches[0].views[0].dtype == torch.uint8
    # Two epochs of three videos, each video once in each.
    epochs = torch.cat([b.epoch for b in batches])
    samples = torch.cat([b.sample for b in batches])
    assert epochs.tolist() == [0, 0, 0, 1, 1, 1]
    assert sorted(samples[:3].tolist()) == sorted(samples[3:].tolist()) == [0, 1, 2]
    assert stream.skipped == {}


def test_a_video_is_shown_differently_in_each_epoch(folder):
    stream = config(global_batch_size=3).build(list_clips(folder), seed=0)
    first, second = next(stream), next(stream)
    for sample in range(3):
        a, b = (batch.views[0][batch.sample == sample] for batch in (first, second))
        assert not torch.equal(a, b)


@pytest.mark.parametrize("threads", [0, 2])
def test_state_is_exact_at_every_step_whatever_the_threads(folder, threads):
    paths = list_clips(folder)
    plain = config().build(paths, seed=3)
    batches = [next(plain) for _ in range(4)]
    stream = config(threads=threads).build(paths, seed=3)
    for number in range(4):
        resumed = config(threads=2 - threads).build(paths, seed=3)
        resumed.load_state_dict(stream.state_dict())
        assert same(next(resumed), batches[number])
        assert same(next(stream), batches[number])
        resumed.close()
    stream.load_state_dict({**stream.state_dict(), "epoch": 0, "position": 2})
    assert same(next(stream), batches[1])
    stream.close()


def test_ranks_share_a_batch(folder):
    paths = list_clips(folder)
    whole = config().build(paths, seed=0)
    parts = [config().build(paths, seed=0, rank=rank, world_size=2) for rank in (0, 1)]
    for _ in range(2):
        expected, found = next(whole), [next(part) for part in parts]
        assert torch.equal(expected.views[0], torch.cat([part.views[0] for part in found]))
    assert parts[0].state_dict() == parts[1].state_dict() == whole.state_dict()


def test_videos_that_give_no_clip_are_counted_and_replaced(folder, tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"nothing" * 50)
    paths = [*list_clips(folder), broken, tmp_path / "missing.mp4"]
    stream = config(global_batch_size=5).build(paths, seed=0)
    batch = next(stream)
    assert len(batch) == 5
    assert set(batch.sample.tolist()) <= {0, 1, 2}
    assert set(stream.skipped) == {"undecodable", "missing"}
    resumed = config(global_batch_size=5, threads=1).build(paths, seed=0)
    assert same(next(resumed), batch)
    resumed.close()
    with pytest.raises(DataError, match="none of the 1 videos") as raised:
        next(config().build([broken], seed=0))
    assert "\n" not in str(raised.value)


def test_one_good_video_among_missing_ones_is_found_from_every_position(folder, tmp_path):
    paths = [list_clips(folder)[0], *(tmp_path / f"gone{number}.mp4" for number in range(3))]
    stream = config(global_batch_size=1, max_skipped_fraction=1.0).build(paths, seed=0)
    assert {next(stream).sample.item() for _ in range(12)} == {0}


@pytest.mark.parametrize("threads", [0, 1])
def test_a_video_is_counted_once_and_its_first_fault_is_logged(folder, tmp_path, threads, caplog):
    # Of seven in a row four are gone, some of them one after another.
    paths = [*list_clips(folder), *(tmp_path / f"gone{number}.mp4" for number in range(4))]
    order = permutation(7, 0, 0).tolist()
    assert any(a > 2 and b > 2 for a, b in itertools.pairwise(order))
    stream = config(global_batch_size=7, threads=threads).build(paths, seed=0)
    next(stream)
    assert stream.skipped == {"missing": 4}
    assert len(caplog.messages) == 1
    assert "no such file" in caplog.messages[0]
    stream.close()


def test_faults_of_the_batch_ahead_are_not_counted_yet(folder, tmp_path):
    paths = [list_clips(folder)[0], tmp_path / "gone.mp4"]
    ahead = DevicePrefetcher(config(global_batch_size=1).build(paths, seed=0), "cpu")
    plain = config(global_batch_size=1).build(paths, seed=0)
    for _ in range(4):
        next(ahead), next(plain)
        assert ahead.skipped == plain.skipped
    assert plain.skipped == {"missing": 2}


def test_too_many_damaged_videos_stop_the_stream_and_short_ones_do_not(folder, tmp_path):
    videos = list_clips(folder)
    paths = [*videos, *(tmp_path / f"gone{number}.mp4" for number in range(11))]
    with pytest.raises(DataError, match=r"11 of 14 clips.*max_skipped_fraction=0\.01") as raised:
        next(config(global_batch_size=14).build(paths, seed=0))
    assert "\n" not in str(raised.value)
    assert next(config(global_batch_size=14, max_skipped_fraction=0.8).build(paths, seed=0)).views
    short = tmp_path / "short.mp4"
    write_moving_clip(short, seconds=0.1)
    stream = config(global_batch_size=14, short="refuse").build([*videos, *[short] * 11], seed=0)
    next(stream)
    assert stream.skipped == {"too_short": 11}


@pytest.mark.parametrize("threads", [0, 1])
def test_after_an_error_the_stream_stands_where_it_stood(tmp_path, threads):
    paths = [tmp_path / f"late{number}.mp4" for number in range(3)]
    stream = config(global_batch_size=1, threads=threads).build(paths, seed=0)
    with pytest.raises(DataError, match="none of the 3 videos"):
        next(stream)
    assert stream.state_dict()["position"] == 0
    for seed, path in enumerate(paths):
        write_moving_clip(path, seconds=0.5, seed=seed)
    plain = config(global_batch_size=1).build(paths, seed=0)
    for _ in range(3):
        assert same(next(stream), next(plain))
    stream.close()


def test_the_order_of_an_epoch_is_sorted_once(folder, monkeypatch):
    calls = []

    def counted(count, *key):
        calls.append(key)
        return permutation(count, *key)

    monkeypatch.setattr("hjepa_video.stream.permutation", counted)
    stream = config(global_batch_size=3).build(list_clips(folder), seed=1234)
    next(stream), next(stream)
    assert calls == [(1234, 0), (1234, 1)]


def test_a_stream_can_be_sent_to_another_process(folder):
    stream = config().build(list_clips(folder), seed=0)
    next(stream)
    assert same(next(pickle.loads(pickle.dumps(stream))), next(stream))


def test_hidden_files_are_no_videos(tmp_path):
    (tmp_path / "._pan.mp4").write_bytes(b"resource fork")
    with pytest.raises(DataError, match="no video in it"):
        list_clips(tmp_path)
    (tmp_path / "pan.MP4").touch()
    assert list_clips(tmp_path) == [tmp_path / "pan.MP4"]


def test_linked_folders_are_listed_once_and_hidden_and_unreadable_ones_are_not_passed_over(tmp_path, monkeypatch):
    top, elsewhere = tmp_path / "top", tmp_path / "elsewhere"
    for folder in (top / "a", top / ".trash", elsewhere):
        folder.mkdir(parents=True)
        (folder / "pan.mp4").touch()
    (top / "linked").symlink_to(elsewhere)
    (top / "again").symlink_to(top)
    assert list_clips(top) == [top / "a" / "pan.mp4", top / "linked" / "pan.mp4"]

    def locked(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", locked)
    with pytest.raises(DataError, match=r"top: the folder cannot be read \(Permission denied\)"):
        list_clips(top)


def test_short_videos_are_left_out_where_that_is_asked_for(folder):
    stream = config(fps=1.0, short="refuse").build(list_clips(folder), seed=0)
    with pytest.raises(DataError, match="too short"):
        next(stream)
    assert next(config(fps=1.0).build(list_clips(folder), seed=0)).views[0].shape == (2, 3, 4, 32, 32)


def test_a_video_that_is_cut_off_but_longer_than_a_clip_is_not_left_out(folder, tmp_path):
    whole, cut = list_clips(folder)[1], tmp_path / "cut.mkv"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    stream = config(global_batch_size=8, short="refuse").build([cut], seed=0)
    assert len(next(stream)) == 8
    assert stream.skipped == {}


def test_another_list_or_seed_is_no_continuation(folder, tmp_path):
    paths = list_clips(folder)
    state = config().build(paths, seed=0).state_dict()
    for other in (config().build(paths, seed=1), config().build(paths[:2], seed=0)):
        with pytest.raises(DataError, match="start anew"):
            other.load_state_dict(state)
    moved = [tmp_path / path.name for path in paths]
    config().build(moved, seed=0).load_state_dict(state)
    renamed = [*paths[:-1], paths[-1].with_stem("another")]
    with pytest.raises(DataError, match=f"other videos than these {len(paths)}"):
        config().build(renamed, seed=0).load_state_dict(state)
    with pytest.raises(DataError, match="lacks order, samples: it is not that of a stream"):
        config().build(paths, seed=0).load_state_dict({"epoch": 0, "position": 4})
    # A state from before streams said what they hold.
    config().build(renamed, seed=0).load_state_dict({key: state[key] for key in state if key != "contents"})


@pytest.mark.parametrize("kind", [str, Path])
def test_a_path_that_is_no_list_is_not_taken_letter_by_letter(folder, kind):
    with pytest.raises(ValueError, match=r"paths=.*clips.*one path.*list_clips\(folder\)"):
        config().build(kind(folder), seed=0)


def test_wrong_input_is_refused(folder, tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        list_clips(tmp_path / "none")
    with pytest.raises(DataError, match="no video in it"):
        list_clips(tmp_path)
    with pytest.raises(DataError, match="empty"):
        config().build([], seed=0)
    with pytest.raises(ValueError, match="rank"):
        config().build(list_clips(folder), seed=0, rank=2, world_size=2)
    with pytest.raises(ValueError, match="equally"):
        config(global_batch_size=3).build(list_clips(folder), seed=0, rank=0, world_size=2)
    for change in (
        {"global_batch_size": 0},
        {"frames": 0},
        {"fps": 0.0},
        {"fps": math.nan},
        {"fps": math.inf},
        {"max_skipped_fraction": 1.5},
        {"view": ViewGroup(count=2)},
        {"short": "stretch"},
        {"short_side": 0},
        {"threads": -1},
    ):
        with pytest.raises(ValueError, match="allowed"):
            config(**change)
