"""The frames of a clip, read in one pass over its packets and one over the frames that are wanted.

Which frames a file has, and when each is shown, is read from its packets. Decoding then begins at the last key frame
before the first frame that is wanted and ends at the last. That holds for H.264 and HEVC in MP4 and Matroska whose
packets are plain: each with a time stamp of its own, none hidden, none shown before the first. Each frame that is
decoded is checked against its packet. Other files, and those whose frames come out otherwise, are decoded from their
start and counted (`video.probe`), which also says what is wrong with a file.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Collection, Iterator

import av
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from refalign_jax.data.decode import VideoFile, check_end, decode, open_video
from refalign_jax.data.rgb import is_plain, to_rgb
from refalign_jax.data.video import Box, VideoInfo, cut_out, make_square, pixel_aspect, probe, rate_of
from refalign_jax.types import Int

Still = tuple[UInt8[np.ndarray, "h w 3"], float]
"""A frame as the file stores it, upright, and the width of its pixels over their height."""
Choose = Callable[[VideoInfo], Int[np.ndarray, " T"] | None]
"""Chooses frame numbers by the times of all frames, None where there are too few; the same when called again."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Selection:
    """What was read of a video."""

    info: VideoInfo
    """All its frames, or those up to the end that was given."""
    numbers: Int[np.ndarray, " T"] | None
    """The frames that were chosen; None where there are too few."""
    frames: UInt8[np.ndarray, "T h w 3"]
    """Their pixels; T = 0 where there are too few."""
    stills: dict[int, Still]
    """Whole frames that were asked for by number; those that the video does not reach are missing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wish:
    """What is to be read of a video."""

    choose: Choose
    """Chooses the clip's frames."""
    height: int
    """Rows of the clip."""
    width: int
    """Columns of the clip."""
    crop: Box | None = None
    """The region of each frame that becomes the clip, in the file's own pixels; None for all."""
    end: int | None = None
    """Number of frames after which the video is not read; None for all."""
    stills: Collection[int] = ()
    """Frames that are wanted whole."""


@dataclasses.dataclass(frozen=True, eq=False)
class _Packets:
    """The frames of a plain file by its packets."""

    stamps: list[int]
    """Time stamp of each frame, ascending."""
    keys: list[int]
    """Time stamps of the key frames, ascending."""
    info: VideoInfo


def read_clip(path: VideoFile, wish: Wish) -> Selection:
    """Reads a clip.

    Raises:
      ValueError: the file can't be decoded, is damaged up to the last frame that is wanted, or smaller than the crop.
    """
    packets = _read_packets(path, wish.end)
    if packets is not None:
        numbers = wish.choose(packets.info)
        found = _read(path, wish, packets.info, numbers, packets)
        if found is not None:
            return found
    info = probe(path, wish.end)
    found = _read(path, wish, info, wish.choose(info), None)
    if found is None:
        raise ValueError(f"{path} gives other frames when it is decoded again.")
    return found


def read_still(path: VideoFile, frame: int | float) -> Still:
    """Decodes one frame, given by its number or, as a float, by the fraction of the frames that come before it.

    Raises:
      ValueError: the file can't be decoded, or ends before the frame.
    """
    packets = _read_packets(path, None)
    info = probe(path) if packets is None else packets.info
    while True:
        total = info.num_frames
        number = min(int(total * frame), total - 1) if isinstance(frame, float) else frame
        if number >= total:
            raise ValueError(f"{path} ends after {total} frames; frame {number} is asked for.")
        wish = Wish(choose=lambda info: None, height=1, width=1, stills=(number,))
        found = _read(path, wish, info, None, packets)
        if found is not None:
            return found.stills[number]
        if packets is None:
            raise ValueError(f"{path} gives other frames when it is decoded again.")
        packets, info = None, probe(path)


def _read_packets(path: VideoFile, end: int | None) -> _Packets | None:
    """Reads the packets of a file without decoding them; None where they are not plain.

    Raises:
      ValueError: the file can't be opened or is truncated.
    """
    with open_video(path) as (container, stream):
        check_end(path, container, stream)
        named = {*container.format.name.split(",")} & {"mp4", "matroska"}
        if stream.codec_context.name not in ("h264", "hevc") or not named or not stream.time_base:
            return None
        shown: list[tuple[int, int, bool]] = []
        try:
            for packet in container.demux(stream):
                if packet.dts is None and not packet.size:
                    continue
                if packet.pts is None or not packet.size or packet.is_discard or packet.is_corrupt:
                    return None
                shown.append((packet.pts, packet.duration or 0, packet.is_keyframe))
        except av.error.FFmpegError:
            return None
        if not shown or not shown[0][2] or min(shown)[0] != shown[0][0]:
            return None
        shown = sorted(shown)[:end]
        stamps = [stamp for stamp, _, _ in shown]
        if len(set(stamps)) < len(stamps):
            return None
        nominal = [float(rate) for rate in (stream.average_rate, stream.guessed_rate) if rate]
        step = 1 / nominal[0] if nominal else 0.0
        times = np.array([float(stamp * stream.time_base) for stamp in stamps])
        last = float(shown[-1][1] * stream.time_base) or step
        times = np.append(times, times[-1] + last) - times[0]
        info = VideoInfo(times=times, fps=rate_of(times[-2] - times[0], len(stamps) - 1, nominal))
        return _Packets(stamps, [stamp for stamp, _, key in shown if key], info)


def _read(
    path: VideoFile, wish: Wish, info: VideoInfo, numbers: Int[np.ndarray, " T"] | None, packets: _Packets | None
) -> Selection | None:
    """Decodes what is wanted; None where the frames are not those of the packets."""
    wanted = np.array([], np.int64) if numbers is None else numbers
    frames = np.empty((len(wanted), wish.height, wish.width, 3), np.uint8)
    stills = {number for number in wish.stills if number < info.num_frames}
    needed, kept = {*wanted.tolist(), *stills}, 0
    whole: dict[int, Still] = {}
    if needed:
        try:
            for number, frame, aspect in _decode(path, needed, packets):
                places = np.flatnonzero(wanted == number)  # a frame that is shown for long is there several times
                if len(places):
                    frames[places] = _fit(frame, aspect, wish, path)
                    kept += len(places)
                if number in stills:
                    turns = round(frame.rotation / 90)
                    whole[number] = np.rot90(_convert(frame, path), turns), 1 / aspect if turns % 2 else aspect
        except (_OtherFramesError, av.error.FFmpegError):
            return None
        except ValueError:
            if packets is None:
                raise
            return None  # decoded from its start, the file may be whole, or is said to be damaged with better reason
        if kept < len(wanted) or len(whole) < len(stills):
            return None
    return Selection(info=info, numbers=numbers, frames=frames, stills=whole)


class _OtherFramesError(Exception):
    """The frames that were decoded are not those that the packets announced."""


def _decode(path: VideoFile, needed: set[int], packets: _Packets | None) -> Iterator[tuple[int, av.VideoFrame, float]]:
    """Yields number, frame and pixel aspect of frames up to the last that is needed."""
    first, last = min(needed), max(needed)
    with open_video(path) as (container, stream):
        aspect = pixel_aspect(stream, path)
        number = 0
        if packets is not None:
            key = packets.keys[bisect.bisect_right(packets.keys, packets.stamps[first]) - 1]
            number = bisect.bisect_left(packets.stamps, key)
            if number:
                container.seek(key, stream=stream)
        for frame in decode(path, container, stream):
            if packets is not None:
                if frame.pts is not None and frame.pts < packets.stamps[number]:
                    continue  # the seek ended at an earlier key frame
                if frame.pts != packets.stamps[number]:
                    raise _OtherFramesError
            if number in needed:
                yield number, frame, aspect
            number += 1
            if number > last:
                return


def _convert(frame: av.VideoFrame, path: VideoFile) -> UInt8[np.ndarray, "h w 3"]:
    """Converts a whole frame to RGB; a fault names the file."""
    try:
        return to_rgb(frame)
    except ValueError as error:
        raise ValueError(f"{path} can't be decoded: {error}.") from error


def _fit(frame: av.VideoFrame, aspect: float, wish: Wish, path: VideoFile) -> UInt8[np.ndarray, "h w 3"]:
    """Cuts the crop out of a frame and scales it to cover the clip's size."""
    turns = round(frame.rotation / 90)
    size = wish.height, wish.width
    if wish.crop is not None:
        rows, columns = (frame.width, frame.height) if turns % 2 else (frame.height, frame.width)
        left, top, right, bottom = wish.crop
        if not (0 <= left < right <= columns and 0 <= top < bottom <= rows):
            cut_out(np.empty((rows, columns, 0)), wish.crop, str(path))
        if wish.crop == (0, 0, columns, rows):
            wish = dataclasses.replace(wish, crop=None)
    if turns == 0 and aspect == 1 and is_plain(frame, wish.crop):
        box = wish.crop or (0, 0, frame.width, frame.height)
        rows, columns = box[3] - box[1], box[2] - box[0]
        scale = max(wish.height / rows, wish.width / columns)
        scaled = max(round(columns * scale), wish.width), max(round(rows * scale), wish.height)
        try:
            image = to_rgb(frame, wish.crop, scaled)
        except ValueError as error:
            raise ValueError(f"{path} can't be decoded: {error}.") from error
        left, top = (scaled[0] - wish.width) // 2, (scaled[1] - wish.height) // 2
        return image[top : top + wish.height, left : left + wish.width]
    upright = cut_out(np.rot90(_convert(frame, path), turns), wish.crop, str(path))
    return resize_and_crop(make_square(upright, 1 / aspect if turns % 2 else aspect)[None], *size)[0]


def resize_and_crop(frames: UInt8[np.ndarray, "T a b 3"], height: int, width: int) -> UInt8[np.ndarray, "T h w 3"]:
    """Scales frames, keeping their aspect, to the smallest size that covers height x width, and crops the centre."""
    rows, columns = frames.shape[1:3]
    if (rows, columns) == (height, width):
        return frames
    scale = max(height / rows, width / columns)
    left, top = max((columns - width / scale) / 2, 0), max((rows - height / scale) / 2, 0)
    box = (left, top, columns - left, rows - top)
    resized = (Image.fromarray(f).resize((width, height), Image.Resampling.LANCZOS, box) for f in frames)
    return np.stack([np.asarray(image) for image in resized])
