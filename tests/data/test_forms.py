"""Videos as people have them: which frames are shown, when, and in which colours and shape."""

import io
import os
import re
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image
from support.footage import photograph
from support.forms import copy, encode, key_packets, numbered, numbers, put_cover_first, trim_start

from refalign_jax.data.video import probe, read_frames, write_video


def check(path, expected, rate=24):
    """Checks that the frames that show these numbers are read, at their times; returns what `probe` says."""
    info = probe(path)
    assert numbers(read_frames(path, range(info.num_frames))) == list(expected)
    times = (np.array(expected) - expected[0]) / rate
    np.testing.assert_allclose(info.times[:-1], times, atol=1e-3)
    backwards = read_frames(path, range(info.num_frames)[::-1])
    assert numbers(backwards) == list(expected)[::-1]
    return info


@pytest.mark.parametrize("rate", [24, 30, 60])
def test_plain_files_of_any_rate(tmp_path, rate):
    for name, codec in (("x.mp4", "libx264"), ("x.mkv", "libx264"), ("x.webm", "libvpx"), ("x.avi", "mpeg4")):
        encode(tmp_path / name, range(20), codec, rate)
        info = check(tmp_path / name, range(20), rate)
        assert info.fps == rate
        assert info.times[-1] == pytest.approx(20 / rate, abs=2e-3)


def test_mp4_trimmed_by_its_edit_list(tmp_path):
    encode(tmp_path / "x.mp4", range(48))
    trim_start(tmp_path / "x.mp4", 30)
    info = check(tmp_path / "x.mp4", range(30, 48))
    assert info.fps == 24


def test_cut_between_key_frames(tmp_path):
    for name, codec in (("x.mkv", "libx264"), ("x.ts", "libx264"), ("x.avi", "mpeg4"), ("x.webm", "libvpx")):
        encode(tmp_path / name, range(40), codec, gop_size=12, max_b_frames=0)
        second = key_packets(tmp_path / name)[1]
        assert 5 < second < 30
        copy(tmp_path / name, tmp_path / f"cut {name}", lambda index, _: index >= 5)
        check(tmp_path / f"cut {name}", range(second, 40))


@pytest.mark.parametrize(
    ("codec", "options"),
    [
        ("libx264", {"x264-params": "open-gop=1:keyint=8:min-keyint=8:scenecut=0:bframes=3:b-adapt=0"}),
        ("libx265", {"x265-params": "open-gop=1:keyint=8:min-keyint=8:scenecut=0:bframes=3:log-level=none"}),
        ("mpeg2video", {"g": "8", "bf": "2"}),
    ],
)
def test_open_groups_cut_without_encoding(tmp_path, codec, options):
    encode(tmp_path / "x.mkv", range(40), codec, options=options)
    keys = key_packets(tmp_path / "x.mkv")
    with av.open(str(tmp_path / "x.mkv")) as container:
        packets = list(container.demux(video=0))
    key = packets[keys[1]]
    leading = [packet for packet in packets[keys[1] :] if packet.pts is not None and packet.pts < key.pts]
    assert leading, "the group is closed"
    first = round(float(key.pts * key.time_base) * 24)
    copy(tmp_path / "x.mkv", tmp_path / "cut.mkv", lambda index, _: index >= keys[1])
    check(tmp_path / "cut.mkv", range(first, 40))


def test_avi_with_null_frames(tmp_path):
    shown = [0, 2, 3, 5, 6, 7, 11, 12]
    encode(tmp_path / "x.avi", shown, "mpeg4")
    with av.open(str(tmp_path / "x.avi")) as container:
        assert container.streams.video[0].frames == 13  # the header counts the null frames
    check(tmp_path / "x.avi", shown)


def test_hidden_frames_of_vp8(tmp_path):
    encode(tmp_path / "x.webm", range(20), "libvpx")
    with av.open(str(tmp_path / "x.webm")) as given, av.open(str(tmp_path / "y.webm"), "w") as container:
        stream = container.add_stream_from_template(given.streams.video[0])
        for number, packet in enumerate(given.demux(video=0)):
            if packet.size:
                data = bytearray(packet)
                data[0] &= ~16 if number in (3, 8) else 255  # VP8's bit `show_frame`
                hidden = av.Packet(bytes(data))
                hidden.pts, hidden.dts, hidden.time_base = packet.pts, packet.dts, packet.time_base
                hidden.is_keyframe, hidden.stream = packet.is_keyframe, stream
                container.mux(hidden)
    check(tmp_path / "y.webm", [number for number in range(20) if number not in (3, 8)])


def test_cover_art_is_no_video(tmp_path):
    encode(tmp_path / "x.mp4", range(12))
    picture = io.BytesIO()
    Image.fromarray(photograph("cat")).save(picture, "JPEG")
    put_cover_first(tmp_path / "x.mp4", picture.getvalue())
    with av.open(str(tmp_path / "x.mp4")) as container:
        assert [stream.codec_context.name for stream in container.streams.video] == ["mjpeg", "h264"]
    check(tmp_path / "x.mp4", range(12))


def test_variable_rate_with_a_pause(tmp_path):
    shown = [*range(10), *range(58, 68)]
    encode(tmp_path / "x.mp4", shown)
    info = check(tmp_path / "x.mp4", shown)
    assert info.fps == pytest.approx(19 / (67 / 24))


def test_only_as_many_frames_as_asked_are_counted(tmp_path):
    encode(tmp_path / "x.mp4", range(20))
    assert probe(tmp_path / "x.mp4", 7).num_frames == 7
    assert probe(tmp_path / "x.mp4", 70).num_frames == 20


def test_reading_in_threads_gives_the_same_bytes(tmp_path):
    encode(tmp_path / "x.mp4", range(30))
    expected = read_frames(tmp_path / "x.mp4", range(30))
    with ThreadPoolExecutor(4) as pool:
        for seed, read in enumerate(pool.map(lambda s: read_frames(tmp_path / "x.mp4", order(s)), range(8))):
            np.testing.assert_array_equal(read, expected[order(seed)])


def order(seed):
    return np.random.default_rng(seed).permutation(30)[:10]


@pytest.mark.parametrize(("name", "codec"), [("x.mkv", "libx264"), ("x.webm", "libvpx"), ("x.avi", "mpeg4")])
def test_files_whose_end_is_missing(tmp_path, name, codec):
    encode(tmp_path / name, range(40), codec)
    data = (tmp_path / name).read_bytes()
    for part in (0.9, 0.5):
        (tmp_path / name).write_bytes(data[: int(part * len(data))])
        with pytest.raises(ValueError, match=rf"{re.escape(name)} (is (damaged or )?truncated|can't be decoded)"):
            probe(tmp_path / name)


def test_matroska_that_is_damaged_between_its_frames(tmp_path):
    encode(tmp_path / "x.mkv", range(40))
    data = (tmp_path / "x.mkv").read_bytes()
    with av.open(str(tmp_path / "x.mkv")) as container:
        places = [packet.pos - 2 for packet in container.demux(video=0) if packet.size]  # identifier, length of a byte
    for place in places[3::9]:
        assert data[place] == 0xA3  # SimpleBlock
        (tmp_path / "x.mkv").write_bytes(data[:place] + b"\x01" + data[place + 1 :])
        with pytest.raises(ValueError, match=r"x\.mkv is (damaged at byte|truncated)"):
            probe(tmp_path / "x.mkv")


def test_matroska_as_it_is_recorded_live(tmp_path):
    encode(tmp_path / "x.mkv", range(20), max_b_frames=0)
    with (
        av.open(str(tmp_path / "x.mkv")) as given,
        av.open(str(tmp_path / "y.mkv"), "w", options={"live": "1"}) as live,
    ):
        stream = live.add_stream_from_template(given.streams.video[0])
        for packet in given.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                live.mux(packet)
    assert bytes.fromhex("18538067 01ffffffffffffff") in (tmp_path / "y.mkv").read_bytes()  # a segment without an end
    check(tmp_path / "y.mkv", range(20))
    with (tmp_path / "y.mkv").open("ab") as file:
        file.write(bytes(5000))  # padding
    check(tmp_path / "y.mkv", range(20))


def test_avi_with_frames_out_of_order(tmp_path):
    for codec in ("libx264", "mpeg4"):
        encode(tmp_path / "x.avi", range(20), codec, max_b_frames=2)
        check(tmp_path / "x.avi", range(20))


def test_recordings_that_were_joined(tmp_path):
    encode(tmp_path / "a.ts", range(12))
    encode(tmp_path / "b.ts", range(12, 20))
    (tmp_path / "x.ts").write_bytes((tmp_path / "a.ts").read_bytes() + (tmp_path / "b.ts").read_bytes())
    check(tmp_path / "x.ts", range(20))


@pytest.mark.parametrize(("name", "codec"), [("x.mp4", "mpeg4"), ("x.mpg", "mpeg2video"), ("x.mp4", "libx264")])
def test_damage_that_a_decoder_would_mend(tmp_path, name, codec):
    encode(tmp_path / name, range(40), codec)
    with av.open(str(tmp_path / name)) as container:
        first = next(packet for packet in container.demux(video=0) if packet.is_keyframe)
        picture = bytes(first)
    data = (tmp_path / name).read_bytes()
    middle = picture[-80:-40]
    assert data.count(middle) == 1
    (tmp_path / name).write_bytes(data.replace(middle, bytes(range(100, 140))))
    with pytest.raises(ValueError, match=rf"{re.escape(name)} (can't be decoded|is damaged|shows no frame)"):
        probe(tmp_path / name)


def test_what_is_no_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, message in [
        (tmp_path / "pipe", "is a FIFO, a socket or a device; expected a video."),
        ("/dev/zero", "is a FIFO, a socket or a device; expected a video."),
        (tmp_path, "is a folder; expected a video."),
    ]:
        for call in (probe, lambda path: read_frames(path, [0])):
            with pytest.raises(ValueError, match=re.escape(f"{path} {message}")):
                call(path)


def test_frames_of_too_many_pixels_are_not_decoded(tmp_path):
    with av.open(str(tmp_path / "x.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=24)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv420p"
        container.mux(stream.encode(av.VideoFrame(16, 16, "yuv420p")))
        container.mux(stream.encode())
    data = (tmp_path / "x.mkv").read_bytes()
    for tag in (b"\xb0\x81\x10", b"\xba\x81\x10"):  # PixelWidth and PixelHeight, 16
        assert data.count(tag) == 1
    data = data.replace(b"\xb0\x81\x10", b"\xb0\x81\x7f")
    (tmp_path / "y.mkv").write_bytes(data)
    import refalign_jax.data.decode as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MOST_PIXELS", 1000)
        with pytest.raises(ValueError, match=r"y\.mkv has frames of 127x16; at most 1000 pixels are read\."):
            probe(tmp_path / "y.mkv")


@pytest.mark.parametrize(("aspect", "size"), [(Fraction(16, 9), (64, 171)), (Fraction(1, 2), (128, 96))])
def test_pixels_become_square(tmp_path, aspect, size):
    encode(tmp_path / "x.mp4", range(3), sample_aspect_ratio=aspect)
    frames = read_frames(tmp_path / "x.mp4", range(3))
    assert frames.shape == (3, *size, 3)
    back = np.stack([np.asarray(Image.fromarray(frame).resize((96, 64))) for frame in frames])
    assert numbers(back) == [0, 1, 2]
    cropped = read_frames(tmp_path / "x.mp4", [1], crop=(0, 0, 24, 32))  # regions count the file's own pixels
    assert cropped.shape == (1, round(32 * size[0] / 64), round(24 * size[1] / 96), 3)
    assert cropped.mean() > 200


def test_pixels_become_square_after_the_turn(tmp_path):
    if not hasattr(av.VideoStream, "set_display_rotation"):
        pytest.skip("this PyAV can't write a rotation")
    encode(tmp_path / "x.mp4", range(3), sample_aspect_ratio=Fraction(2))
    with av.open(str(tmp_path / "x.mp4")) as given, av.open(str(tmp_path / "y.mp4"), "w") as turned:
        stream = turned.add_stream_from_template(given.streams.video[0])
        stream.set_display_rotation(90)
        for packet in given.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                turned.mux(packet)
    frame = read_frames(tmp_path / "y.mp4", [2])[0]
    assert frame.shape == (192, 64, 3)
    assert numbers(np.asarray(Image.fromarray(np.rot90(frame, -1)).resize((96, 64)))[None]) == [2]


def lossless(path, signal, *, format, **tags):
    """Writes two frames of RGB signals, uint8 or uint16 [rows, columns, 3], coded in a format with the given tags."""
    tags = {"colorspace": 2, "color_range": 0, "color_trc": 2, "color_primaries": 2} | tags
    matrix = {1: 1, 9: 9}.get(tags["colorspace"], 5)
    given = av.VideoFrame.from_ndarray(signal, format="rgb24" if signal.dtype == np.uint8 else "gbrp16le")
    options = {"dst_colorspace": tags.pop("coded", matrix), "interpolation": 2 | 0x2000 | 0x40000}
    options["dst_color_range"] = "JPEG" if tags["color_range"] == 2 else "MPEG"
    frame = given.reformat(format=format, **options)
    for name, value in tags.items():
        setattr(frame, name, value)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=24)
        stream.height, stream.width, stream.pix_fmt = *signal.shape[:2], format
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
        for number in range(2):
            frame.pts, frame.time_base = number, Fraction(1, 24)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def patches(seed, rows=32, columns=32):
    """Random colours in squares of 16, float in [0.1, 0.9]."""
    values = np.random.default_rng(seed).uniform(0.1, 0.9, (rows // 16, columns // 16, 3))
    return np.kron(values, np.ones((16, 16, 1)))


@pytest.mark.parametrize(
    ("rows", "columns", "tags"),
    [
        (32, 32, {}),
        (32, 32, {"colorspace": 1}),
        (32, 32, {"colorspace": 5, "color_range": 2}),
        (32, 32, {"colorspace": 1, "color_range": 2}),
        (32, 32, {"colorspace": 9}),
        (720, 32, {"coded": 1}),
        (16, 1280, {"coded": 1}),
        (720, 32, {"colorspace": 6}),
    ],
)
def test_matrix_and_range_are_respected(tmp_path, rows, columns, tags):
    colours = patches(0, rows, columns)
    lossless(tmp_path / "x.mkv", np.rint(colours * 255).astype(np.uint8), format="yuv444p", **tags)
    np.testing.assert_allclose(read_frames(tmp_path / "x.mkv", [0])[0], colours * 255, atol=2.5)


TO_BT2020 = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])
"""Light in BT.709's primaries to light in BT.2020's, ITU-R BT.2087."""


def pq(light):
    """SMPTE ST 2084's inverse EOTF of light in cd/m²."""
    power = (light / 10000) ** (2610 / 16384)
    return ((3424 / 4096 + 2413 / 128 * power) / (1 + 2392 / 128 * power)) ** (2523 / 32)


def hlg(light):
    """ARIB STD-B67's OETF after the inverse OOTF of a display of 1000 cd/m²."""
    shown = light / 1000
    luminance = shown @ np.array([0.2627, 0.6780, 0.0593])
    scene = shown * luminance[..., None] ** (1 / 1.2 - 1)
    return np.where(
        scene <= 1 / 12, np.sqrt(3 * scene), 0.17883277 * np.log(12 * scene - 0.28466892 + 1e-9) + 0.55991073
    )


@pytest.mark.parametrize(("transfer", "number"), [(pq, 16), (hlg, 18)])
def test_hdr_becomes_sdr(tmp_path, transfer, number):
    colours = patches(1) * 0.9
    light = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    signal = transfer(203 * (light @ TO_BT2020.T))
    tags = {"colorspace": 9, "color_primaries": 9, "color_trc": number, "color_range": 1}
    lossless(tmp_path / "x.mkv", np.rint(signal * 65535).astype(np.uint16), format="yuv444p10le", **tags)
    np.testing.assert_allclose(read_frames(tmp_path / "x.mkv", [0])[0], colours * 255, atol=4)


def test_highlights_are_bent_and_keep_their_hue(tmp_path):
    steps = 203 * np.linspace(0.1, 20, 64)
    signal = pq(np.stack([steps, steps / 2, steps / 4], -1) @ TO_BT2020.T)[None].repeat(16, 0)
    tags = {"colorspace": 9, "color_primaries": 9, "color_trc": 16, "color_range": 1}
    lossless(tmp_path / "x.mkv", np.rint(signal * 65535).astype(np.uint16), format="yuv444p10le", **tags)
    read = read_frames(tmp_path / "x.mkv", [0])[0, 8].astype(int)
    assert (np.diff(read[:, 0]) >= -1).all()
    assert read[-1, 0] > 253
    assert ((read[4:, 0] > read[4:, 1]) & (read[4:, 1] > read[4:, 2])).all()


def test_sdr_of_bt2020_becomes_bt709(tmp_path):
    colours = patches(2)
    signal = (colours**2.4 @ TO_BT2020.T) ** (1 / 2.4)
    tags = {"colorspace": 9, "color_primaries": 9, "color_trc": 14, "color_range": 1}
    lossless(tmp_path / "x.mkv", np.rint(signal * 65535).astype(np.uint16), format="yuv444p10le", **tags)
    np.testing.assert_allclose(read_frames(tmp_path / "x.mkv", [0])[0], colours * 255, atol=4)


def test_colours_that_can_not_be_converted(tmp_path):
    lossless(tmp_path / "x.mkv", np.full((32, 32, 3), 30000, np.uint16), format="yuv444p10le", colorspace=14)
    with pytest.raises(
        ValueError, match=r"x\.mkv can't be decoded: its colours are coded by matrix 14 of ITU-T H\.273"
    ):
        read_frames(tmp_path / "x.mkv", [0])


def test_dolby_vision_of_colours_of_its_own_is_refused(tmp_path):
    encode(tmp_path / "x.mp4", range(6), "libx265", options={"x265-params": "log-level=none"})
    data = (tmp_path / "x.mp4").read_bytes()
    assert data.count(b"hev1") == 1
    (tmp_path / "x.mp4").write_bytes(data.replace(b"hev1", b"dvhe"))
    with pytest.raises(ValueError, match=r"x\.mp4 is Dolby Vision without HDR10, HLG or SDR below it"):
        probe(tmp_path / "x.mp4")


def test_plain_files_are_read_as_before(tmp_path):
    write_video(tmp_path / "x.mp4", np.stack([numbered(k) for k in range(9)]), fps=12)
    with av.open(str(tmp_path / "x.mp4")) as container:
        plain = [f.to_ndarray(format="rgb24", interpolation=2 | 0x2000 | 0x40000) for f in container.decode(video=0)]
    np.testing.assert_array_equal(read_frames(tmp_path / "x.mp4", range(9)), plain)
