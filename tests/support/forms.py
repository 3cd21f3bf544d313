"""Videos in the forms that people have, whose pictures show the number of their frame as a pattern of bits."""

import struct
from fractions import Fraction

import av
import numpy as np

ROWS, COLUMNS = 64, 96


def numbered(number):
    """A picture of eight squares, light for a bit of the number that is set."""
    bits = np.array([number >> bit & 1 for bit in range(8)], np.uint8).reshape(2, 4)
    return np.kron(bits, np.ones((32, 24), np.uint8))[..., None].repeat(3, 2) * 160 + np.uint8(48)


def numbers(frames):
    """The numbers that pictures show."""
    means = frames.reshape(len(frames), 2, 32, 4, 24, 3).mean((2, 4, 5)).reshape(len(frames), 8)
    return ((means > 128) << np.arange(8)).sum(1).tolist()


def encode(path, shown, codec="libx264", rate=24, *, options=None, **settings):
    """Writes a video whose frame at time k/rate shows the number k, for each k of `shown`."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height, stream.pix_fmt = COLUMNS, ROWS, "yuv420p"
        for name, value in settings.items():
            setattr(stream.codec_context, name, value)
        for number in shown:
            frame = av.VideoFrame.from_ndarray(numbered(number % 256), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def copy(source, target, keep):
    """Copies the packets for which `keep(index, packet)` is true into another file, as `-c copy` does."""
    with av.open(str(source)) as given, av.open(str(target), "w") as container:
        stream = container.add_stream_from_template(given.streams.video[0])
        for index, packet in enumerate(given.demux(video=0)):
            if packet.dts is not None and keep(index, packet):
                packet.stream = stream
                container.mux(packet)


def key_packets(path):
    """The numbers of the key packets, in the file's order."""
    with av.open(str(path)) as container:
        return [index for index, packet in enumerate(container.demux(video=0)) if packet.is_keyframe and packet.size]


def trim_start(path, frames, rate=24):
    """Changes an MP4's edit list so that play starts a number of frames later; nothing else is touched."""
    data = bytearray(path.read_bytes())
    at = data.index(b"elst")
    with av.open(str(path)) as container:
        scale = container.streams.video[0].time_base.denominator
    assert struct.unpack(">II", data[at + 4 : at + 12]) == (0, 1)  # version 0, one entry
    duration, start = struct.unpack(">II", data[at + 12 : at + 20])
    changed = duration - round(1000 * frames / rate), start + frames * scale // rate
    data[at + 12 : at + 20] = struct.pack(">II", *changed)
    path.write_bytes(data)


def put_cover_first(path, picture):
    """Puts a JPEG as cover art before the video track of an MP4 whose index lies at its end."""

    def atom(name, body):
        return struct.pack(">I", 8 + len(body)) + name + body

    item = atom(b"covr", atom(b"data", struct.pack(">II", 13, 0) + picture))
    handler = atom(b"hdlr", bytes(8) + b"mdirappl" + bytes(9))
    cover = atom(b"udta", atom(b"meta", bytes(4) + handler + atom(b"ilst", item)))
    data = path.read_bytes()
    at = data.index(b"moov") - 4
    assert data.index(b"mdat") < at
    body = data[at + 8 :]
    place = body.index(b"trak") - 4
    path.write_bytes(data[:at] + atom(b"moov", body[:place] + cover + body[place:]))
