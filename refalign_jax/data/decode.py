"""The frames of a video file that are shown, in order; every fault of a file is one sentence.

What is shown is what decodes: frames before the start that an edit list sets, frames of an open GOP whose references
were cut off, and hidden frames are not. A file is damaged or truncated if its demuxer or its decoder says so; the
number of frames that a header states decides nothing.
"""

from __future__ import annotations

import collections
import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path

import av
from av.stream import Disposition

from refalign_jax.data.files import check_file
from refalign_jax.data.matroska import check_matroska
from refalign_jax.data.stored import Stored

VideoFile = str | os.PathLike[str] | Stored
"""A video: a path, or one that lies at a URL or within an archive."""

MOST_PIXELS = 1 << 26
"""Pixels of a frame, 8192x8192; decoders of larger ones are not started."""
_LENIENT = ("mpeg4", "mpeg2video", "mpeg1video")
"""Decoders that mend damage silently unless this option makes them refuse it."""
_DOLBY = ("dvh1", "dvhe", "dav1")
"""Codec tags of Dolby Vision; its profile 5 has colours of its own, and names no transfer function."""


@contextlib.contextmanager
def open_video(path: VideoFile) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """Opens a file and its first video stream that is no cover picture.

    Raises:
      ValueError: no such file, one that FFmpeg can't open or decode, without video, or with too large frames.
    """
    if isinstance(path, Stored):
        place: str | io.BytesIO = io.BytesIO(path.read())
    else:
        check_file(path, "a video")
        place = f"file:{os.fspath(path)}"
    try:
        # Metadata is not always UTF-8.
        with av.open(place, "r", metadata_errors="replace") as container:
            streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
            if not streams:
                raise ValueError(f"{path} has no video stream.")
            stream = streams[0]
            if stream.codec_context is None:
                raise ValueError(f"{path} can't be decoded: its codec is unknown.")
            codec = stream.codec_context
            if codec.name in ("hevc", "av1") and codec.codec_tag in _DOLBY and codec.color_trc in (0, 2):
                raise ValueError(f"{path} is Dolby Vision without HDR10, HLG or SDR below it; its colours are unknown.")
            if stream.width * stream.height > MOST_PIXELS:
                raise ValueError(
                    f"{path} has frames of {stream.width}x{stream.height}; at most {MOST_PIXELS} pixels are read."
                )
            strict = {"err_detect": "explode"} if codec.name in _LENIENT else {}
            codec.options = {"max_pixels": str(MOST_PIXELS)} | strict
            stream.thread_type = "AUTO"
            yield container, stream
    except av.error.FFmpegError as error:
        raise ValueError(f"{path} can't be decoded: {error.strerror or error}.") from error


def decode(path: VideoFile, container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.VideoFrame]:
    """Yields the frames that are shown, in their order.

    Decoding starts at the first key frame. Frames shown before it belong to a group whose start was cut off. A file
    that begins with a key frame and does not show it is damaged.

    Raises:
      ValueError: a packet or a frame is damaged.
      av.error.FFmpegError: the decoder refuses a packet.
    """
    count, started, cut, first = 0, False, False, None
    unstamped = container.format.name == "avi"  # its packets are in the order of decoding, one a frame
    waiting: collections.deque[int | None] = collections.deque()
    for packet in container.demux(stream):
        ends = packet.dts is None and not packet.size
        if not started and packet.is_keyframe and packet.size:
            started, first, cut = True, None if unstamped else packet.pts, cut or packet.is_discard
        if not (started and (packet.size or ends)):  # an empty packet repeats the frame before it
            cut = True
            continue
        if packet.is_corrupt:
            raise ValueError(f"{path} is damaged or truncated after {count} frames.")
        if unstamped and packet.size:
            waiting.append(packet.dts)
        for frame in packet.decode():
            if waiting:
                frame.pts = waiting.popleft()
            if first is not None and frame.pts is not None and frame.pts < first:
                continue
            late = not (count or cut) and first is not None and frame.pts is not None and frame.pts > first
            if frame.is_corrupt or late:
                raise ValueError(f"{path} is damaged at frame {count}.")
            count += 1
            yield frame


def check_end(path: VideoFile, container: av.container.InputContainer, stream: av.VideoStream) -> None:
    """Checks that a file reaches as far as its index says and, for Matroska, that it is whole.

    Raises:
      ValueError: the file is truncated or damaged.
    """
    size = len(path.read()) if isinstance(path, Stored) else Path(path).stat().st_size
    ends = [entry.pos + entry.size for entry in stream.index_entries if not entry.is_discard]
    there = sum(end <= size for end in ends)
    if there < len(ends):
        raise ValueError(f"{path} is truncated: {there} of {len(ends)} frames are there.")
    if "matroska" in container.format.name:
        with io.BytesIO(path.read()) if isinstance(path, Stored) else open(path, "rb") as file:
            check_matroska(file, size, path)
