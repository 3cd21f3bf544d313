"""Which frames of a video become the clip, and how they get its size."""

from __future__ import annotations

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from refalign_jax.types import Int


def choose_frames(
    available: int, num_frames: int, stride: int, rng: np.random.Generator
) -> Int[np.ndarray, " T"] | None:
    """Chooses the frames of a clip.

    A stretch of (T−1)·stride + 1 frames at a random start, each stride-th of it; from a video shorter than that, T
    frames spread evenly from the first to the last.

    Args:
      available: frames there are.
      num_frames: T.
      stride: frames from one to the next, 1 for every frame.
      rng: draws the start.

    Returns:
      Ascending frame numbers from 0, no two the same; None with fewer than T frames.
    """
    if available < num_frames:
        return None
    span = (num_frames - 1) * stride + 1
    if available < span:
        return np.linspace(0, available - 1, num_frames).round().astype(np.int64)
    return rng.integers(available - span + 1) + stride * np.arange(num_frames)


def resize_and_crop(frames: UInt8[np.ndarray, "T a b 3"], height: int, width: int) -> UInt8[np.ndarray, "T h w 3"]:
    """Resizes frames, aspect kept, until they cover height x width, and cuts out the centre of that size."""
    rows, columns = frames.shape[1:3]
    if (rows, columns) == (height, width):
        return frames
    scale = max(height / rows, width / columns)
    left, top = max((columns - width / scale) / 2, 0), max((rows - height / scale) / 2, 0)
    box = (left, top, columns - left, rows - top)
    resized = (Image.fromarray(f).resize((width, height), Image.Resampling.LANCZOS, box) for f in frames)
    return np.stack([np.asarray(image) for image in resized])
