"""Files to pixels and back, and every way in which files are not what they should be."""

import subprocess
import sys

import av
import numpy as np
import pytest
from support.footage import panned, photograph
from support.places import ROOT, environment

from refalign_jax.data.video import cut_out, probe, read_frames, to_float, to_pixels, write_latents, write_video
from refalign_jax.encoders.dct import DCTCodec


@pytest.fixture
def clip(tmp_path):
    write_video(tmp_path / "clip.mp4", panned("cat"), fps=12.5)
    return tmp_path / "clip.mp4"


def psnr(a, b):
    return 10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2))


def test_pixels_become_floats_and_come_back():
    pixels = np.arange(256, dtype=np.uint8).reshape(-1, 1).repeat(3, 1)
    values = to_float(pixels)
    assert values.dtype == np.float32
    assert (values.min(), values.max()) == (-1, 1)
    np.testing.assert_array_equal(to_pixels(values), pixels)
    np.testing.assert_array_equal(to_pixels(np.array([[-3.0, 0.0, 3.0]])), [[0, 128, 255]])


def test_video_comes_back(clip):
    info = probe(clip)
    assert (info.num_frames, info.fps) == (12, 12.5)
    frames = read_frames(clip, range(12))
    assert frames.dtype == np.uint8
    assert psnr(frames, panned("cat")) > 35
    for channel in range(3):  # a wrong colour matrix would shift one of them
        assert abs(frames[..., channel].mean() - panned("cat")[..., channel].mean()) < 1


def test_frames_are_chosen_in_any_order_and_cropped(clip):
    frames = read_frames(clip, range(12))
    np.testing.assert_array_equal(read_frames(clip, [7, 2, 7]), frames[[7, 2, 7]])
    np.testing.assert_array_equal(read_frames(clip, [3], crop=(10, 4, 50, 60))[0], frames[3, 4:60, 10:50])


def test_same_frames_give_the_same_bytes_and_replace_the_file(clip, tmp_path):
    write_video(tmp_path / "again.mp4", panned("cat"), fps=12.5)
    assert (tmp_path / "again.mp4").read_bytes() == clip.read_bytes()
    write_video(clip, panned("cat", 3), fps=12.5)
    assert probe(clip).num_frames == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.mp4", "clip.mp4"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc alone fills memory on demand")
def test_the_bytes_of_a_video_do_not_depend_on_what_memory_held(tmp_path):
    """glibc fills each block of memory that it hands out; an encoder that reads it unset would write other bytes."""
    code = """
import hashlib, sys
import numpy as np
from refalign_jax.data.video import write_video
rng, digest = np.random.default_rng(0), hashlib.sha256()
for h, w, count in ((32, 48, 5), (48, 80, 17), (128, 224, 5)):
    rows, columns, times = np.mgrid[:h, :w, :count]
    for noise in (0, 4, 30):
        wave = 128 + 60 * np.sin(columns / 6 + times) + 40 * np.cos(rows / 7 + times / 5)
        wave += noise * rng.standard_normal(rows.shape)
        frames = np.stack([wave, wave[:, ::-1], wave / 2], -1).clip(0, 255).astype(np.uint8)
        write_video(sys.argv[1], np.moveaxis(frames, 2, 0), 8.0)
        digest.update(open(sys.argv[1], "rb").read())
print(digest.hexdigest())
"""
    command = [sys.executable, "-c", code, str(tmp_path / "x.mp4")]
    values = [environment(MALLOC_PERTURB_=str(value)) for value in (0, 1, 170)]
    runs = [subprocess.run(command, cwd=ROOT, env=v, capture_output=True, text=True, check=True) for v in values]
    assert len({run.stdout for run in runs}) == 1


def test_latents_are_decoded_and_written(tmp_path):
    codec = DCTCodec(4, 48)
    paths = [tmp_path / "cat.mp4", tmp_path / "coffee.mp4"]
    videos = np.stack([to_float(panned(path.stem, 5)) for path in paths])
    latents = codec.encode(videos)
    for path, one in zip(paths, latents, strict=True):
        frames = codec.decode(one[None])[0]
        np.testing.assert_array_equal(write_latents(path, one, codec, 8), frames)
        write_video(tmp_path / "expected.mp4", to_pixels(frames), 8)
        assert path.read_bytes() == (tmp_path / "expected.mp4").read_bytes()


def remux(source, target, change):
    """Copies the packets into a file whose stream `change` alters."""
    with av.open(str(source)) as given, av.open(str(target), "w") as container:
        stream = container.add_stream_from_template(given.streams.video[0])
        change(stream)
        for packet in given.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                container.mux(packet)


@pytest.mark.parametrize("angle", [90, 180, -90])
def test_rotated_video_is_turned_upright(clip, tmp_path, angle):
    if not hasattr(av.VideoStream, "set_display_rotation"):
        pytest.skip("this PyAV can't write a rotation")
    remux(clip, tmp_path / "turned.mp4", lambda stream: stream.set_display_rotation(angle))
    expected = np.rot90(read_frames(clip, [5])[0], angle // 90)
    np.testing.assert_array_equal(read_frames(tmp_path / "turned.mp4", [5])[0], expected)


def test_metadata_that_is_not_utf8_does_no_harm(clip):
    data = clip.read_bytes()
    assert b"VideoHandler" in data
    clip.write_bytes(data.replace(b"VideoHandler", b"\xce\xe1\xf0\xe0\xe1\xee\xf2\xf7\xe8\xea\xe0\xe0"))
    assert probe(clip).num_frames == 12
    assert read_frames(clip, [11]).shape == (1, 64, 96, 3)


def test_files_that_are_no_videos(tmp_path, clip):
    (tmp_path / "text.mp4").write_text("not a video")
    truncated = tmp_path / "truncated.mp4"
    truncated.write_bytes(clip.read_bytes()[:2000])
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    for name, message in [
        ("none.mp4", r"none\.mp4 does not exist; expected a video"),
        ("text.mp4", r"text\.mp4 can't be decoded: Invalid data found"),
        ("sound.wav", r"sound\.wav has no video stream"),
    ]:
        for call in (probe, lambda path: read_frames(path, [0])):
            with pytest.raises(ValueError, match=message):
                call(tmp_path / name)
    with pytest.raises(ValueError, match=r"truncated\.mp4 (can't be decoded|is damaged|ends after)"):
        read_frames(truncated, range(12))
    with pytest.raises(ValueError, match=r"truncated\.mp4 is truncated: \d of 12 frames are there\."):
        probe(truncated)


def test_damaged_frames_are_not_handed_out(clip):
    data = bytearray(clip.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 400] = bytes(400)
    clip.write_bytes(data)
    with pytest.raises(ValueError, match=r"clip\.mp4 (can't be decoded|is damaged at frame|ends after)"):
        read_frames(clip, range(12))


def test_frames_and_crops_outside(clip):
    with pytest.raises(ValueError, match=r"ends after 12 frames; frame 12 is asked for"):
        read_frames(clip, [3, 12])
    with pytest.raises(ValueError, match=r"right 97, bottom 64 does not fit .*clip\.mp4, 96x64"):
        read_frames(clip, [0], crop=(0, 0, 97, 64))
    with pytest.raises(ValueError, match="does not fit the image, 128x96"):
        cut_out(photograph("cat"), (5, 5, 5, 9), "the image")


@pytest.mark.parametrize(
    ("frames", "fps", "message"),
    [
        (np.zeros((2, 5, 6, 3), np.uint8), 8, "5x6; H.264 wants even"),
        (np.zeros((2, 4, 6, 3), np.float32), 8, "float32"),
        (np.zeros((0, 4, 6, 3), np.uint8), 8, r"\(0, 4, 6, 3\)"),
        (np.zeros((2, 4, 6, 3), np.uint8), 0, "fps is 0"),
    ],
)
def test_frames_that_can_not_be_written(tmp_path, frames, fps, message):
    with pytest.raises(ValueError, match=message):
        write_video(tmp_path / "x.mp4", frames, fps)
    assert not list(tmp_path.iterdir())


def test_video_into_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(OSError, match=r"x\.mp4 can't be written: No such file"):
        write_video(tmp_path / "no" / "x.mp4", panned("cat", 1), 8)
