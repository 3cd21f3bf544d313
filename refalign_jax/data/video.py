"""Video files to RGB pixels, and frames or latents to MP4.

Files give and take pixels p, uint8 in [0, 255]; networks take values v = p/127.5 − 1 in [-1, 1].
"""

from __future__ import annotations

import dataclasses
import fractions
import itertools
import os
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from refalign_jax.atomic import atomic_write
from refalign_jax.data.decode import VideoFile, check_end, decode, open_video
from refalign_jax.data.rgb import to_rgb
from refalign_jax.encoders.interface import VideoCodec
from refalign_jax.types import Float

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels; right and bottom are the first column and row outside."""

TICK = 1.5e-3
"""Seconds by which time stamps may be off: containers round them, Matroska to whole milliseconds."""


def to_float(pixels: UInt8[np.ndarray, "*n 3"]) -> Float[np.ndarray, "*n 3"]:
    """Turns pixels in [0, 255] into float32 in [-1, 1]."""
    return pixels.astype(np.float32) / np.float32(127.5) - 1


def to_pixels(values: Float[np.ndarray, "*n 3"]) -> UInt8[np.ndarray, "*n 3"]:
    """Turns values in [-1, 1], clipped to it, into pixels in [0, 255]."""
    return np.rint((np.clip(values, -1, 1) + 1) * 127.5).astype(np.uint8)


class BoxError(ValueError):
    """A box is empty or reaches outside of its picture."""


def cut_out(image: np.ndarray, box: Box | None, what: str) -> np.ndarray:
    """Cuts a box out of an image or a mask.

    Args:
      image: [rows, columns, ...].
      box: the box; None for all of it.
      what: the image's name, for the message.

    Returns:
      A copy.

    Raises:
      BoxError: the box is empty or reaches outside.
    """
    rows, columns = image.shape[:2]
    left, top, right, bottom = box or (0, 0, columns, rows)
    if not (0 <= left < right <= columns and 0 <= top < bottom <= rows):
        raise BoxError(
            f"The box left {left}, top {top}, right {right}, bottom {bottom} does not fit {what}, {columns}x{rows}."
        )
    return image[top:bottom, left:right].copy()


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class VideoInfo:
    """Which frames of a video file are shown, and when."""

    times: Float[np.ndarray, " N+1"]
    """Seconds, float64, ascending: when each frame is shown, from 0, and when the last one ends."""
    fps: float
    """Frames a second, on average where the rate varies; 0 where the file does not say."""

    @property
    def num_frames(self) -> int:
        """N, the number of frames that are shown."""
        return len(self.times) - 1


def probe(path: VideoFile, most: int | None = None) -> VideoInfo:
    """Counts a video's frames by decoding them, because containers often state other numbers than what is shown.

    Args:
      path: a video in any format that FFmpeg decodes.
      most: the number of frames after which to stop; None for all.

    Raises:
      ValueError: no such file, not a video, or one that is damaged or whose end is missing.
    """
    shown: list[tuple[float, float]] = []
    with open_video(path) as (container, stream):
        check_end(path, container, stream)
        nominal = [float(rate) for rate in (stream.average_rate, stream.guessed_rate) if rate]
        step = 1 / nominal[0] if nominal else 0.0
        ahead = 0.0
        for frame in itertools.islice(decode(path, container, stream), most):
            start, length = shown[-1] if shown else (-step, step)
            time = start + length if frame.time is None else frame.time + ahead
            if shown and time < start:  # recordings were joined; the second begins where the first ends
                ahead += start + length - time
                time = start + length
            shown.append((time, float(frame.duration * (frame.time_base or 0)) or step))
    if not shown:
        raise ValueError(f"{path} shows no frame: none can be decoded.")
    times = np.array([*(time for time, _ in shown), sum(shown[-1])])
    return VideoInfo(times=times - times[0], fps=rate_of(times[-2] - times[0], len(shown) - 1, nominal))


def rate_of(seconds: float, steps: int, nominal: Sequence[float]) -> float:
    """Returns the rate of frames shown in a number of seconds: a nominal one if it agrees, else the average."""
    for rate in nominal:
        if abs(steps / rate - seconds) <= TICK:
            return rate
    return float(np.round(steps / seconds, 6)) if seconds > 0 else next(iter(nominal), 0.0)


def read_frames(
    path: VideoFile, numbers: Sequence[int] | np.ndarray, crop: Box | None = None
) -> UInt8[np.ndarray, "N h w 3"]:
    """Decodes chosen frames, turned upright where the file has a rotation and with square pixels.

    Args:
      path: a video in any format that FFmpeg decodes.
      numbers: frame numbers from 0, in any order, as `probe` counts them.
      crop: the region of each frame to return, in the file's own pixels; None for all of it.

    Returns:
      RGB in the order of `numbers`.

    Raises:
      ValueError: the file can't be decoded, ends before a frame that is asked for, is damaged up to the last one, is
        smaller than the crop, or states pixels more than ten times as wide as high or the reverse.
    """
    wanted = [int(number) for number in numbers]
    assert wanted, "no frame asked for"
    assert min(wanted) >= 0, wanted
    kept: dict[int, np.ndarray] = {}
    count, last, chosen, turns = 0, max(wanted), set(wanted), 0
    with open_video(path) as (container, stream):
        aspect = pixel_aspect(stream, path)
        for number, frame in enumerate(itertools.islice(decode(path, container, stream), last + 1)):
            count = number + 1
            if number in chosen:
                turns = round(frame.rotation / 90)
                try:
                    upright = np.rot90(to_rgb(frame), turns)
                except ValueError as error:
                    raise ValueError(f"{path} can't be decoded: {error}.") from error
                kept[number] = cut_out(upright, crop, str(path))
    if len(kept) < len(chosen):
        raise ValueError(f"{path} ends after {count} frames; frame {last} is asked for.")
    if len({frame.shape for frame in kept.values()}) > 1:
        raise ValueError(f"{path} changes its size between frames.")
    return np.stack([make_square(kept[number], 1 / aspect if turns % 2 else aspect) for number in wanted])


def make_square(image: np.ndarray, aspect: float) -> np.ndarray:
    """Enlarges an image or a mask so that its pixels become square.

    Args:
      image: uint8 [rows, columns, 3], or bool [rows, columns].
      aspect: width of its pixels over their height.
    """
    rows, columns = image.shape[:2]
    size = max(round(columns * aspect), columns), max(round(rows / aspect), rows)
    if size == (columns, rows):
        return image
    smooth = Image.Resampling.NEAREST if image.dtype == bool else Image.Resampling.LANCZOS
    return np.asarray(Image.fromarray(image).resize(size, smooth))


def pixel_aspect(stream: av.VideoStream, path: VideoFile) -> float:
    """Width of a video's pixels over their height, as the file states it.

    Raises:
      ValueError: they are more than ten times as wide as high, or the reverse.
    """
    aspect = float(stream.sample_aspect_ratio or 1)
    if not 0.1 <= aspect <= 10:
        raise ValueError(f"{path} states pixels {aspect:g} times as wide as high; 0.1 to 10 would be right.")
    return aspect


def write_video(
    path: str | os.PathLike[str],
    frames: UInt8[np.ndarray, "T h w 3"],
    fps: float,
    quality: int = 18,
    comment: str = "",
) -> None:
    """Writes an MP4 (H.264, 4:2:0, BT.709), with the same bytes for the same frames.

    Args:
      path: the file to write, replaced if it exists.
      frames: RGB; rows and columns even.
      fps: frames a second.
      quality: x264's constant rate factor, 0 (lossless) to 51.
      comment: text that the file keeps; `read_comment` reads it.

    Raises:
      ValueError: other shapes, odd rows or columns, or a rate that is not positive.
      OSError: the file can't be written.
    """
    frames = np.asarray(frames)
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise ValueError(
            f"{path}: frames are {frames.dtype} {frames.shape}; expected uint8 [frames, rows, columns, 3]."
        )
    if frames.shape[1] % 2 or frames.shape[2] % 2:
        raise ValueError(f"{path}: frames are {frames.shape[1]}x{frames.shape[2]}; H.264 wants even rows and columns.")
    if fps <= 0:
        raise ValueError(f"{path}: fps is {fps}; it must be above 0.")
    with atomic_write(path) as temporary:
        try:
            _encode(os.fspath(temporary), frames, fps, (quality, comment))
        except av.error.FFmpegError as error:
            raise OSError(error.errno, error.strerror) from error


def write_latents(
    path: Path, latents: Float[np.ndarray, "F H W C"], codec: VideoCodec, fps: float, comment: str = ""
) -> Float[np.ndarray, "T h w 3"]:
    """Decodes the latents of a video and writes it as an MP4.

    Args:
      path: the file to write, replaced if it exists.
      latents: normalised.
      codec: decodes them.
      fps: frames a second.
      comment: as in `write_video`.

    Returns:
      What the codec decoded, in [-1, 1], neither clipped nor rounded.

    Raises:
      ValueError: the codec has another number of channels.
      OSError: the file can't be written.
    """
    frames = codec.decode(latents[None])[0]
    write_video(path, to_pixels(frames), fps, comment=comment)
    return frames


def read_comment(path: str | os.PathLike[str]) -> str:
    """Reads the comment of a video file; empty where it has none.

    Raises:
      ValueError: no such file, or not a video.
    """
    with open_video(path) as (container, _):
        return str(container.metadata.get("comment", ""))


def _encode(path: str, frames: UInt8[np.ndarray, "T h w 3"], fps: float, style: tuple[int, str]) -> None:
    """Encodes frames into a file, with a quality and a comment; raises FFmpeg's errors."""
    quality, comment = style
    # Bit-exact mode leaves out the versions of FFmpeg and x264; more than one thread would change the bits.
    options = {"fflags": "+bitexact", "movflags": "+faststart"}
    with av.open(path, "w", format="mp4", options=options) as container:
        if comment:
            container.metadata["comment"] = comment
        stream = container.add_stream("libx264", rate=fractions.Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        # With B-frames that others refer to, and with its tree of macroblocks, x264 reads unset memory: the bits vary.
        stream.options = {"crf": str(quality), "preset": "medium", "x264-params": "b-pyramid=none:mbtree=0"}
        context = stream.codec_context
        context.thread_count = 1
        context.flags |= av.codec.context.Flags.bitexact
        # 1 is BT.709 in the three tables of ITU-T H.273, and limited range in FFmpeg's.
        context.colorspace = context.color_primaries = context.color_trc = context.color_range = 1
        for array in frames:
            frame = av.VideoFrame.from_ndarray(array, format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace="ITU709")))
        container.mux(stream.encode())
