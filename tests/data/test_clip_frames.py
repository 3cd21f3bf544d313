"""Clips read by their packets: the same frames as by decoding all, whichever file, and no more decoded than needed."""

import numpy as np
import pytest
from support.footage import panned
from support.forms import encode, numbers

import refalign_jax.data.clip_frames as clip_frames
from refalign_jax.data.clip_frames import Wish, read_clip, read_still
from refalign_jax.data.video import probe, read_frames, write_video

CODECS = [("x.mp4", "libx264"), ("x.mkv", "libx264"), ("x.webm", "libvpx-vp9"), ("x.avi", "mpeg4"), ("x.ts", "libx264")]


def wish(chosen, **changes):
    return Wish(**{"choose": lambda info: np.array(chosen), "height": 64, "width": 96} | changes)


@pytest.mark.parametrize(("name", "codec"), CODECS)
def test_frames_are_those_of_decoding_all(tmp_path, name, codec):
    encode(tmp_path / name, range(60), codec, gop_size=12)
    info = probe(tmp_path / name)
    for chosen in ([0], [59], [13, 14, 15], [11, 12, 30, 30, 41], list(range(20, 50, 3))):
        found = read_clip(tmp_path / name, wish(chosen, stills=(chosen[0], 50, 99)))
        np.testing.assert_allclose(found.info.times, info.times, atol=1e-6)
        assert found.info.fps == info.fps
        assert numbers(found.frames) == chosen
        np.testing.assert_array_equal(found.frames, read_frames(tmp_path / name, chosen))
        assert {n: numbers(image[None]) for n, (image, _) in found.stills.items()} == {chosen[0]: [chosen[0]], 50: [50]}
        assert numbers(read_still(tmp_path / name, chosen[0])[0][None]) == chosen[:1]
    assert numbers(read_still(tmp_path / name, 0.5)[0][None]) == [30]
    assert numbers(read_still(tmp_path / name, 1.0)[0][None]) == [59]
    with pytest.raises(ValueError, match=r"ends after 60 frames; frame 60 is asked for"):
        read_still(tmp_path / name, 60)


def test_only_frames_around_the_clip_are_decoded(tmp_path, monkeypatch):
    encode(tmp_path / "x.mp4", range(120), "libx264", gop_size=10, options={"sc_threshold": "0"})
    decode, seen = clip_frames.decode, []

    def counted(*arguments):
        for frame in decode(*arguments):
            seen.append(frame)
            yield frame

    monkeypatch.setattr(clip_frames, "decode", counted)
    found = read_clip(tmp_path / "x.mp4", wish([75, 80]))
    assert numbers(found.frames) == [75, 80]
    assert len(seen) <= 11


def test_a_file_whose_frames_come_out_otherwise_is_decoded_from_its_start(tmp_path, monkeypatch):
    encode(tmp_path / "x.mp4", range(40), "libx264", gop_size=10)
    read, calls = clip_frames.probe, []

    def noting(*arguments):
        calls.append(arguments)
        return read(*arguments)

    monkeypatch.setattr(clip_frames, "probe", noting)
    decode = clip_frames.decode
    monkeypatch.setattr(clip_frames, "decode", lambda *a: (f for f in decode(*a) if calls or f.pts))  # loses the first
    found = read_clip(tmp_path / "x.mp4", wish([0, 5]))
    assert numbers(found.frames) == [0, 5]
    assert len(calls) == 1


@pytest.mark.parametrize("crop", [(8, 4, 88, 60), (7, 3, 88, 60), None])
def test_a_crop_is_scaled_alike_with_even_and_odd_edges(tmp_path, crop):
    write_video(tmp_path / "x.mp4", panned("cat"), fps=8)
    found = read_clip(tmp_path / "x.mp4", wish([3, 4], height=32, width=40, crop=crop)).frames
    truth = clip_frames.resize_and_crop(read_frames(tmp_path / "x.mp4", [3, 4], crop), 32, 40)
    assert np.abs(found.astype(int) - truth).mean() < 2.5
    assert abs((found.astype(int) - truth).mean()) < 0.3


def test_a_crop_outside_is_refused(tmp_path):
    write_video(tmp_path / "x.mp4", panned("cat"), fps=8)
    for crop in ((0, 0, 97, 64), (0, 0, 96, 66), (-2, 0, 96, 64), (10, 0, 10, 64)):
        with pytest.raises(ValueError, match=r"The box left .* does not fit \S*x\.mp4, 96x64\."):
            read_clip(tmp_path / "x.mp4", wish([3], crop=crop))
