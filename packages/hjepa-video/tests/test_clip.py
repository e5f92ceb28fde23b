import math
import pickle
import wave
from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from av.stream import Disposition

from hjepa_video import ClipError, ClipProblem, clip_start, probe_clip, read_clip
from hjepa_video.clip import timed_frames
from hjepa_video.testing import frame_numbers, moving_frames, write_clip


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    path = tmp_path_factory.mktemp("video") / "pan.mp4"
    write_clip(path, moving_frames(60), fps=30)
    return path


def remux(source, path, change):
    """Copy the packets of a video; ``change`` is called with their list and may put others in their places."""
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        packets = [packet for packet in old.demux(old.streams.video[0]) if packet.dts is not None]
        stream = new.add_stream_from_template(old.streams.video[0])
        change(packets)
        for packet in packets:
            packet.stream = stream
            new.mux(packet)


def test_header_is_read(video):
    info = probe_clip(video)
    assert (info.width, info.height) == (128, 96)
    assert info.fps == pytest.approx(30)
    assert info.duration == pytest.approx(2.0, abs=0.05)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
def test_time_counts_from_the_first_frame(tmp_path, suffix):
    path = tmp_path / f"late{suffix}"
    write_clip(path, moving_frames(60), fps=30, stamps=range(900, 960))
    assert probe_clip(path).duration == pytest.approx(2.0, abs=0.05)
    assert frame_numbers(read_clip(path, frames=3, fps=5.0, start=1.0)).tolist() == [30, 36, 42]


@pytest.mark.parametrize(
    ("frames", "fps", "start", "expected"),
    [
        (6, 5.0, 0.0, [0, 6, 12, 18, 24, 30]),
        (4, None, 0.0, [0, 1, 2, 3]),
        (4, None, 1.0, [30, 31, 32, 33]),
        (3, 60.0, 1.5, [45, 45, 46]),
        (2, 10.0, 1.73, [52, 55]),
        (1, 1.0, 1.9, [57]),
    ],
)
def test_frames_are_those_at_the_times_asked_for(video, frames, fps, start, expected):
    clip = read_clip(video, frames=frames, fps=fps, start=start)
    assert clip.shape == (frames, 96, 128, 3)
    assert clip.dtype == torch.uint8
    assert frame_numbers(clip).tolist() == expected


def test_pixels_are_those_of_the_frames_encoded(video):
    original = moving_frames(60)[[10, 20]]
    difference = (read_clip(video, frames=2, fps=3.0, start=1 / 3).float() - original.float()).abs()
    assert difference.mean() < 6


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_variable_frame_rate_is_sampled_by_time(tmp_path, suffix):
    steps = np.random.default_rng(0).integers(1, 9, size=39)
    stamps = np.concatenate(([0], np.cumsum(steps)))
    path = tmp_path / f"vfr{suffix}"
    write_clip(path, moving_frames(40), fps=30, stamps=stamps.tolist())
    for fps, start in ((4.0, 0.0), (11.0, 2.01)):
        wanted = start + np.arange(10) / fps
        found = frame_numbers(read_clip(path, frames=10, fps=fps, start=start)).numpy()
        distance = np.abs(stamps[None] / 30 - wanted[:, None])
        # Matroska rounds time stamps to milliseconds.
        np.testing.assert_allclose(distance[np.arange(10), found], distance.min(1), atol=2e-3)


@pytest.mark.parametrize(
    ("stamps", "expected"),
    [
        ([1, 2, 4, 3, 5, 7, 6, 8], [1, 2, 3, 4, 5, 6, 7, 8]),
        ([4, 3, 2, 1, 5], [1, 2, 3, 4, 5]),
        ([None, None, None], [0, 1, 2]),
        ([0, 3, None, 7], [0, 3, 4, 7]),
    ],
)
def test_time_stamps_out_of_order_do_not_shuffle_frames(stamps, expected):
    # AVI files with B-frames decode so: the frames stand in the order of showing, their stamps do not.
    frames = [SimpleNamespace(pts=None if stamp is None else stamp + 10) for stamp in stamps]
    packets = [SimpleNamespace(decode=lambda frame=frame: [frame]) for frame in frames]
    stream = SimpleNamespace(time_base=Fraction(1, 25), start_time=10)
    timed = list(timed_frames(packets, stream, 1 / 25))
    assert [frame for _, frame in timed] == frames
    assert [time * 25 for time, _ in timed] == pytest.approx(expected)


def test_consecutive_frames_of_a_file_with_b_frames_follow_one_another(tmp_path):
    path = tmp_path / "b_frames.avi"
    write_clip(path, moving_frames(40), fps=25, b_frames=2)
    numbers = frame_numbers(read_clip(path, frames=30, start=0.2))
    assert (numbers.diff() == 1).all()


def test_mpeg_streams_with_b_frames_are_read_from_their_first_frame_to_their_last(tmp_path):
    # Seeking to their start loses the frames before the second keyframe, and their header leaves out the last frames.
    path = tmp_path / "pan.mpg"
    write_clip(path, moving_frames(90), fps=30, b_frames=2, codec="mpeg2video")
    assert probe_clip(path).duration < 89 / 30
    assert frame_numbers(read_clip(path, frames=90)).tolist() == list(range(90))
    assert frame_numbers(read_clip(path, frames=5, start=85 / 30, short="refuse")).tolist() == [85, 86, 87, 88, 89]


@pytest.mark.parametrize(("suffix", "codec"), [(".mpg", "mpeg4"), (".ts", "mpeg4"), (".mpg", "libx264")])
def test_frames_after_a_seek_between_keyframes_are_whole_and_on_time(tmp_path, suffix, codec):
    # Without their keyframe MPEG-4 frames come out grey; in program streams some packets have no time stamp.
    path = tmp_path / f"pan{suffix}"
    write_clip(path, moving_frames(60), fps=30, codec=codec)
    for start in range(2, 60, 3):
        found = frame_numbers(read_clip(path, frames=1, start=start / 30)).item()
        assert abs(found - start) <= (codec == "libx264")


def test_every_clip_of_every_kind_moves_and_is_a_function_of_its_start(clips):
    for path in clips:
        info = probe_clip(path)
        start = info.duration / 3
        first, again = (read_clip(path, frames=4, fps=8.0, start=start, short_side=64) for _ in range(2))
        assert torch.equal(first, again)
        assert min(first.shape[1:3]) == 64
        change = (first[1:].float() - first[:-1].float()).abs().mean((1, 2, 3))
        assert change.max() > 0.1
        # The same frame, reached by decoding from the start instead of seeking.
        steps = round(start * 8)
        through = read_clip(path, frames=steps + 1, fps=8.0, short_side=64)[-1]
        assert torch.equal(through, read_clip(path, frames=1, start=steps / 8, short_side=64)[0])


def test_a_short_video_starts_again_or_is_refused(tmp_path):
    path = tmp_path / "short.mp4"
    write_clip(path, moving_frames(10), fps=10)
    assert frame_numbers(read_clip(path, frames=7, fps=5.0)).tolist() == [0, 2, 4, 6, 8, 0, 2]
    assert frame_numbers(read_clip(path, frames=5, fps=5.0, short="refuse")).tolist() == [0, 2, 4, 6, 8]
    with pytest.raises(ClipError, match="too short") as raised:
        read_clip(path, frames=7, fps=5.0, short="refuse")
    assert raised.value.problem is ClipProblem.too_short
    assert "\n" not in str(raised.value)


def test_the_last_frame_lasts_as_long_as_the_file_says(tmp_path, video):
    def last_three_seconds(packets):
        packets[-1].duration = round(3 / float(packets[-1].time_base))

    path = tmp_path / "still.mp4"
    remux(video, path, last_three_seconds)
    clip = read_clip(path, frames=9, fps=2.0, short="refuse")
    assert frame_numbers(clip).tolist() == [0, 15, 30, 45, 59, 59, 59, 59, 59]
    # It ends after 59 / 30 + 3 = 4.97 s.
    assert frame_numbers(read_clip(path, frames=3, fps=2.0, start=4.4)).tolist() == [59, 59, 13]


def test_a_packet_that_cannot_be_decoded_is_passed_over(tmp_path, video):
    def damage(packets):
        damaged = av.Packet(bytes(len(bytes(packets[11]))))
        damaged.pts, damaged.dts = packets[11].pts, packets[11].dts
        damaged.time_base, damaged.duration = packets[11].time_base, packets[11].duration
        packets[11] = damaged

    path = tmp_path / "damaged.mp4"
    remux(video, path, damage)
    with av.open(str(path)) as container, pytest.raises(av.error.InvalidDataError):
        list(container.decode(video=0))
    assert frame_numbers(read_clip(path, frames=60)).tolist() == [*range(11), 10, *range(12, 60)]


def test_streams_that_appear_late_do_not_matter(tmp_path):
    # A file that begins without sound, as recordings do.
    silent, loud, path = tmp_path / "silent.ts", tmp_path / "loud.ts", tmp_path / "late.ts"
    write_clip(silent, moving_frames(60))
    with av.open(str(loud), "w") as container:
        songs = [container.add_stream("mp2", rate=48000) for _ in range(12)]
        sound = av.AudioFrame(format="s16", layout="mono", samples=1152)
        sound.sample_rate = 48000
        container.mux([packet for song in songs for packet in (*song.encode(sound), *song.encode())])
    path.write_bytes(silent.read_bytes() * 10 + loud.read_bytes() + silent.read_bytes() * 10)
    with av.open(str(path)) as container:
        assert len(container.streams) == 1
    assert len(read_clip(path, frames=2, start=1000.0)) == 2


def test_a_video_that_cannot_start_again_gives_no_clip_of_fewer_frames(video, monkeypatch):
    # In some AVI files with a damaged index only seeking finds frames.
    def lose_the_start(opened):
        monkeypatch.setattr(type(opened), "packets", lambda _: iter(()))

    monkeypatch.setattr("hjepa_video.clip._Video.rewind", lose_the_start)
    assert len(read_clip(video, frames=4, fps=10.0, start=1.6)) == 4
    with pytest.raises(ClipError, match="its start cannot be decoded"):
        read_clip(video, frames=5, fps=10.0, start=1.6)


def test_a_file_cut_off_ends_where_its_frames_end(tmp_path):
    whole, cut = tmp_path / "whole.mkv", tmp_path / "cut.mkv"
    write_clip(whole, moving_frames(60), fps=30)
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    numbers = frame_numbers(read_clip(cut, frames=8, fps=4.0))
    assert numbers[0] == 0
    assert numbers[1] in (7, 8)
    assert numbers.max() < 45
    with pytest.raises(ClipError, match="too short"):
        read_clip(cut, frames=8, fps=4.0, short="refuse")


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_frames_are_turned_upright(tmp_path, rotation):
    path = tmp_path / "turned.mp4"
    frames = moving_frames(4)
    write_clip(path, frames, rotation=rotation)
    expected = torch.rot90(frames[0], rotation // 90, (0, 1))
    found = read_clip(path, frames=1)[0]
    assert found.shape == expected.shape
    assert (found.float() - expected.float()).abs().mean() < 8


def test_titles_that_are_no_utf8_do_not_matter(tmp_path):
    path = tmp_path / "latin.avi"
    write_clip(path, moving_frames(4))
    data = path.read_bytes()
    assert b"Lavf" in data
    path.write_bytes(data.replace(b"Lavf", b"\xe9avf"))
    assert frame_numbers(read_clip(path, frames=4)).tolist() == [0, 1, 2, 3]


def test_a_name_with_a_colon_is_no_protocol(tmp_path, monkeypatch, video):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "take:1.mp4").write_bytes(video.read_bytes())
    assert read_clip("take:1.mp4", frames=1).shape == (1, 96, 128, 3)


def test_a_codec_without_decoder_is_refused_in_one_line(tmp_path):
    path = tmp_path / "codec.avi"
    write_clip(path, moving_frames(4))
    path.write_bytes(path.read_bytes().replace(b"FMP4", b"ZZZZ"))
    for call in (probe_clip, read_clip):
        with pytest.raises(ClipError, match="no decoder") as raised:
            call(path)
        assert raised.value.problem is ClipProblem.undecodable


def test_an_error_comes_whole_out_of_another_process(tmp_path):
    with pytest.raises(ClipError) as raised:
        probe_clip(tmp_path / "none.mp4")
    copy = pickle.loads(pickle.dumps(raised.value))
    assert (type(copy), copy.problem, str(copy)) == (ClipError, ClipProblem.missing, str(raised.value))


def test_what_gives_no_clip_is_refused_in_one_line(tmp_path):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("no video\n" * 100)
    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(bytes(1600))
    for name, problem, message in (
        ("none.mp4", ClipProblem.missing, "no such file"),
        # The system refuses to look for it, as it does on a disk that is gone.
        ("x" * 300, ClipProblem.missing, "no such file"),
        ("empty.mp4", ClipProblem.undecodable, "cannot be decoded"),
        ("text.mp4", ClipProblem.undecodable, "cannot be decoded"),
        ("sound.wav", ClipProblem.no_video, "no video stream"),
    ):
        for call in (probe_clip, read_clip):
            with pytest.raises(ClipError, match=message) as raised:
                call(tmp_path / name)
            assert raised.value.problem is problem
            assert name in str(raised.value)
            assert "\n" not in str(raised.value)


def test_the_cover_of_a_song_is_no_video(tmp_path):
    path = tmp_path / "song.mp4"
    with av.open(str(path), "w") as container:
        cover, song = container.add_stream("mjpeg", rate=1), container.add_stream("aac", rate=8000)
        cover.width, cover.height, cover.pix_fmt, cover.disposition = 128, 96, "yuvj420p", Disposition.attached_pic
        container.mux(cover.encode(av.VideoFrame(128, 96, "yuvj420p")))
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        sound.sample_rate = 8000
        container.mux(song.encode(sound))
        container.mux([*cover.encode(), *song.encode()])
    for call in (probe_clip, read_clip):
        with pytest.raises(ClipError, match="no video stream"):
            call(path)


@pytest.mark.parametrize(
    "change",
    [
        {"frames": 0},
        {"fps": 0.0},
        {"fps": math.nan},
        {"fps": math.inf},
        {"start": -1.0},
        {"start": math.nan},
        {"start": math.inf},
        {"short_side": 0},
        {"threads": -1},
        {"short": "stretch"},
    ],
)
def test_arguments_out_of_range_are_refused(video, change):
    with pytest.raises(ValueError, match=f"{next(iter(change))}=.*allowed: ") as raised:
        read_clip(video, **change)
    assert not isinstance(raised.value, ClipError)


def test_starts_fill_the_video_and_depend_on_seed_epoch_and_sample():
    starts = torch.tensor([clip_start(10.0, 4.0, 0, epoch, 3) for epoch in range(2000)])
    assert starts.min() >= 0
    assert starts.max() <= 6
    assert starts.mean() == pytest.approx(3.0, abs=0.15)
    assert clip_start(10.0, 4.0, 0, 1, 3) == pytest.approx(starts[1].item())
    assert len({clip_start(10.0, 4.0, *key) for key in ((0, 1, 3), (1, 1, 3), (0, 2, 3), (0, 1, 4))}) == 4
    assert clip_start(2.0, 4.0, 0, 0, 0) == 0.0
