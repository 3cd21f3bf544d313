"""A record's pixels: which frames of the video become the clip, at which size, and its references on white."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from refalign_jax.config import PrepareConfig
from refalign_jax.data.records import Record, Skipped, random_of, subject_ids
from refalign_jax.data.references import load_reference
from refalign_jax.data.video import probe, read_frames
from refalign_jax.types import Int

UNREADABLE_VIDEO = "the video can't be read"
UNREADABLE_REFERENCE = "a reference can't be read"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Clip:
    """A record's pixels, ready to be encoded."""

    record: Record
    video: UInt8[np.ndarray, "T h w 3"]
    references: UInt8[np.ndarray, "R h w 3"]
    subject_ids: Int[np.ndarray, " R"]
    """int32."""
    metadata: Mapping[str, Any]
    """JSON: the record's, and frame rate, frame numbers and subjects."""


def load_clip(record: Record, config: PrepareConfig) -> Clip | Skipped:
    """Reads a record's clip and references at the size that `config` sets.

    What is random depends on the record's id and `config.seed` alone.

    Returns:
      The clip, or the reason why it can't be used: a file can't be read, or the clip has too few frames.
    """
    rng = random_of(record.id, config.seed)
    try:
        info = probe(record.video)
        first, end = record.frames or (0, info.num_frames)
        available = min(end, info.num_frames) - first
        chosen = choose_frames(available, config.num_frames, config.stride, rng)
        if chosen is None:
            detail = f"{record.video} has {max(available, 0)} frames of the clip; {config.num_frames} are needed."
            return Skipped(id=record.id, reason=f"fewer than {config.num_frames} frames", detail=detail)
        video = read_frames(record.video, chosen + first, record.crop)
    except ValueError as error:
        return Skipped(id=record.id, reason=UNREADABLE_VIDEO, detail=str(error))
    used = record.references[: config.max_references]
    size = (config.height, config.width)
    try:
        references = [load_reference(reference, *size, augment=config.augment, rng=rng) for reference in used]
    except ValueError as error:
        return Skipped(id=record.id, reason=UNREADABLE_REFERENCE, detail=str(error))
    return Clip(
        record=record,
        video=resize_and_crop(video, *size),
        references=np.stack(references) if references else np.empty((0, *size, 3), np.uint8),
        subject_ids=subject_ids(used),
        metadata={
            **record.metadata,
            "fps": info.fps / config.stride,
            "frames": (chosen + first).tolist(),
            "subjects": [reference.subject for reference in used],
        },
    )


def choose_frames(
    available: int, num_frames: int, stride: int, rng: np.random.Generator
) -> Int[np.ndarray, " T"] | None:
    """Chooses the frames of a clip.

    It takes every `stride`-th frame of a span of (T−1)·stride + 1 frames at a random start. A video shorter than that
    span gives T frames spread evenly from its first to its last.

    Args:
      available: number of frames of the video.
      num_frames: T.
      stride: distance between consecutive frames of the clip, 1 for every frame.
      rng: draws the start.

    Returns:
      Frame numbers from 0 in strictly ascending order; None for a video of fewer than T frames.
    """
    if available < num_frames:
        return None
    span = (num_frames - 1) * stride + 1
    if available < span:
        return np.linspace(0, available - 1, num_frames).round().astype(np.int64)
    return rng.integers(available - span + 1) + stride * np.arange(num_frames)


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
