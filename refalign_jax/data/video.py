"""Video and image files to RGB pixels, and frames or latents to MP4.

Files give and take pixels p, uint8 in [0, 255]; networks take values v = p/127.5 − 1 in [-1, 1].
"""

from __future__ import annotations

import contextlib
import dataclasses
import fractions
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import av
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from refalign_jax.atomic import atomic_write
from refalign_jax.encoders.interface import VideoCodec
from refalign_jax.types import Bool, Float

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels; right and bottom are the first column and row outside."""

_UNBIASED = 2 | 0x2000 | 0x40000
"""FFmpeg's SWS_BILINEAR, SWS_FULL_CHR_H_INT and SWS_ACCURATE_RND; its faster default is one grey level too dark."""


def to_float(pixels: UInt8[np.ndarray, "*n 3"]) -> Float[np.ndarray, "*n 3"]:
    """Turns pixels in [0, 255] into float32 in [-1, 1]."""
    return pixels.astype(np.float32) / np.float32(127.5) - 1


def to_pixels(values: Float[np.ndarray, "*n 3"]) -> UInt8[np.ndarray, "*n 3"]:
    """Turns values in [-1, 1], clipped to it, into pixels in [0, 255]."""
    return np.rint((np.clip(values, -1, 1) + 1) * 127.5).astype(np.uint8)


def cut_out(image: np.ndarray, box: Box | None, what: str) -> np.ndarray:
    """Cuts a box out of an image or a mask.

    Args:
      image: [rows, columns, ...].
      box: the box; None for all of it.
      what: the image's name, for the message.

    Returns:
      A copy.

    Raises:
      ValueError: the box is empty or reaches outside.
    """
    rows, columns = image.shape[:2]
    left, top, right, bottom = box or (0, 0, columns, rows)
    if not (0 <= left < right <= columns and 0 <= top < bottom <= rows):
        raise ValueError(
            f"The box left {left}, top {top}, right {right}, bottom {bottom} does not fit {what}, {columns}x{rows}."
        )
    return image[top:bottom, left:right].copy()


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """What a video file's container says without decoding."""

    num_frames: int
    """Number of frames."""
    fps: float
    """Frames a second on average; 0 where the file does not say."""


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """Opens a file and its first video stream; errors of FFmpeg become one sentence."""
    if not Path(path).is_file():
        raise ValueError(f"{path} does not exist; expected a video.")
    try:
        # Metadata is not always UTF-8.
        with av.open(os.fspath(path), metadata_errors="replace") as container:
            if not container.streams.video:
                raise ValueError(f"{path} has no video stream.")
            yield container, container.streams.video[0]
    except av.error.FFmpegError as error:
        raise ValueError(f"{path} can't be decoded: {error.strerror or error}.") from error


def probe(path: str | os.PathLike[str]) -> VideoInfo:
    """Counts a video's frames by reading its packets, because containers often state a wrong number.

    Raises:
      ValueError: no such file, not a video, or one whose end is missing.
    """
    with _opened(path) as (container, stream):
        rate, promised = stream.average_rate, stream.frames
        shown = [not packet.is_discard for packet in container.demux(stream) if packet.size and not packet.is_corrupt]
    if len(shown) < promised:
        raise ValueError(f"{path} is truncated: {len(shown)} of {promised} frames are there.")
    return VideoInfo(num_frames=sum(shown), fps=float(rate) if rate else 0.0)


def read_frames(
    path: str | os.PathLike[str], numbers: Sequence[int] | np.ndarray, crop: Box | None = None
) -> UInt8[np.ndarray, "N h w 3"]:
    """Decodes chosen frames, and turns them upright where the file has a rotation.

    Args:
      path: a video in any format that FFmpeg decodes.
      numbers: frame numbers from 0, in any order.
      crop: the region of each frame to return; None for all of it.

    Returns:
      RGB in the order of `numbers`.

    Raises:
      ValueError: the file can't be decoded, ends before a frame that is asked for, is damaged in one, or is smaller
        than the crop.
    """
    wanted = [int(number) for number in numbers]
    assert wanted, "no frame asked for"
    assert min(wanted) >= 0, wanted
    kept: dict[int, np.ndarray] = {}
    count = 0
    with _opened(path) as (container, stream):
        stream.thread_type = "AUTO"
        for count, frame in enumerate(container.decode(stream), start=1):
            if frame.is_corrupt:
                raise ValueError(f"{path} is damaged at frame {count - 1}.")
            if count - 1 in wanted:
                pixels = frame.to_ndarray(format="rgb24", interpolation=_UNBIASED)
                upright = np.rot90(pixels, round(frame.rotation / 90))
                kept[count - 1] = cut_out(upright, crop, str(path))
            if count > max(wanted):
                break
    if len(kept) < len(set(wanted)):
        raise ValueError(f"{path} ends after {count} frames; frame {max(wanted)} is asked for.")
    if len({frame.shape for frame in kept.values()}) > 1:
        raise ValueError(f"{path} changes its size between frames.")
    return np.stack([kept[number] for number in wanted])


def write_video(
    path: str | os.PathLike[str], frames: UInt8[np.ndarray, "T h w 3"], fps: float, quality: int = 18
) -> None:
    """Writes an MP4 (H.264, 4:2:0, BT.709), with the same bytes for the same frames.

    Args:
      path: the file to write, replaced if it exists.
      frames: RGB; rows and columns even.
      fps: frames a second.
      quality: x264's constant rate factor, 0 (lossless) to 51.

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
            _encode(os.fspath(temporary), frames, fps, quality)
        except av.error.FFmpegError as error:
            raise OSError(error.errno, error.strerror) from error


def write_latents(
    paths: Sequence[Path], latents: Float[np.ndarray, "B F H W C"], codec: VideoCodec, fps: float
) -> None:
    """Decodes latents and writes an MP4 for each.

    Args:
      paths: the files to write, one per video.
      latents: normalised.
      codec: decodes them.
      fps: frames a second.

    Raises:
      ValueError: the codec has another number of channels.
      OSError: a file can't be written.
    """
    for path, frames in zip(paths, to_pixels(codec.decode(latents)), strict=True):
        write_video(path, frames, fps)


def _encode(path: str, frames: UInt8[np.ndarray, "T h w 3"], fps: float, quality: int) -> None:
    """Encodes frames into a file; raises FFmpeg's errors."""
    # Bit-exact mode leaves out the versions of FFmpeg and x264; more than one thread would change the bits.
    options = {"fflags": "+bitexact", "movflags": "+faststart"}
    with av.open(path, "w", format="mp4", options=options) as container:
        stream = container.add_stream("libx264", rate=fractions.Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": str(quality), "preset": "medium"}
        context = stream.codec_context
        context.thread_count = 1
        context.flags |= av.codec.context.Flags.bitexact
        # 1 is BT.709 in the three tables of ITU-T H.273, and limited range in FFmpeg's.
        context.colorspace = context.color_primaries = context.color_trc = context.color_range = 1
        for array in frames:
            frame = av.VideoFrame.from_ndarray(array, format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace="ITU709")))
        container.mux(stream.encode())


@contextlib.contextmanager
def _image(path: str | os.PathLike[str], what: str) -> Iterator[Image.Image]:
    """Opens an image, turned upright by its EXIF; errors of Pillow become one sentence."""
    try:
        with Image.open(path) as file:
            yield ImageOps.exif_transpose(file)
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist; expected {what}.") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is not {what} in a format that Pillow knows.") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} can't be read as {what}: {str(error).rstrip('.')}.") from error


def read_image(path: str | os.PathLike[str]) -> UInt8[np.ndarray, "h w 3"]:
    """Reads an image in any format that Pillow knows, turned upright by its EXIF; transparent pixels become white.

    Raises:
      ValueError: no such file, or not a whole image.
    """
    with _image(path, "an image") as image:
        if image.mode.startswith("I;16"):  # Pillow would clip these at 255
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
        return np.asarray(image.convert("RGB"))


def read_mask(path: str | os.PathLike[str]) -> Bool[np.ndarray, "h w"]:
    """Reads a mask, true on the subject.

    The subject is the pixels at least half as bright as the brightest one or, where opacity varies, half as opaque as
    the most opaque one. So masks of 0 and 1, of 0 and 255, and of two colours of a palette are all read as intended. A
    black mask is empty.

    Raises:
      ValueError: no such file, or not a whole image.
    """
    with _image(path, "a mask") as image:
        values = np.asarray(image.convert("RGBA"))
    opacity, brightness = values[..., 3], values[..., :3].max(-1)
    level = opacity if opacity.min() < 255 else brightness
    return (level > 0) & (2 * level.astype(np.int32) >= level.max())
