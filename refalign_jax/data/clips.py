"""A record's pixels: which frames of the video become the clip, at which size, and its references on white."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import UInt8

from refalign_jax.atomic import first_line
from refalign_jax.config import PrepareConfig
from refalign_jax.data.clip_frames import Selection, Still, Wish, read_clip
from refalign_jax.data.inputs import read_inputs
from refalign_jax.data.records import Entry, Record, Reference, Skipped, subject_ids
from refalign_jax.data.references import load_reference
from refalign_jax.data.seeds import random_of
from refalign_jax.data.video import TICK, BoxError, VideoInfo
from refalign_jax.digests import Digests
from refalign_jax.types import Bool, Float, Int

UNREADABLE_RECORD = "the record can't be read"
INPUTS = "inputs"
"""Where an example's metadata has the digests of its files."""
UNREADABLE_VIDEO = "the video can't be read"
CROP_OUTSIDE = "the crop lies outside of the frame"
UNREADABLE_REFERENCE = "a reference can't be read"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Clip:
    """A record's pixels, ready to be encoded."""

    record: Record
    video: UInt8[np.ndarray, "T h w 3"]
    references: UInt8[np.ndarray, "R h w 3"]
    subjects: Bool[np.ndarray, "R h w"]
    """True where a reference shows its subject."""
    subject_ids: Int[np.ndarray, " R"]
    """int32."""
    metadata: Mapping[str, Any]
    """JSON: the record's, and frame rate, frame numbers and subjects."""
    inputs: str = ""
    """Digest of everything that it was read from; empty where that was not asked for."""


def load_record(record: Record | Skipped | Entry, config: PrepareConfig, digests: Digests) -> Clip | Skipped:
    """Reads one record and digests its files: the step of preparation that needs no encoder.

    The result depends on the record, its files and `config.seed` alone, whatever process reads it. Records, entries
    and clips can be pickled.

    Args:
      record: what a source yields.
      config: sizes and settings.
      digests: of the dataset's folder; each process makes its own.

    Returns:
      The clip, or why it is left out; whatever goes wrong leaves out this record alone.
    """
    try:
        found = record if isinstance(record, Record | Skipped) else record.read()
        clip = found if isinstance(found, Skipped) else load_clip(found, config)
        if isinstance(clip, Skipped):
            return clip
        inputs = read_inputs(clip.record, config.max_references, digests)
    except Exception as error:  # a fault in one file must not end a run of days
        return Skipped(id=record.id, reason=UNREADABLE_RECORD, detail=f"{type(error).__name__}: {first_line(error)}.")
    metadata = {**clip.metadata, INPUTS: dict(inputs.files)}
    return dataclasses.replace(clip, metadata=metadata, inputs=inputs.digest)


def load_clip(record: Record, config: PrepareConfig) -> Clip | Skipped:
    """Reads a record's clip and references at the size that `config` sets.

    What is random depends on the record's id and `config.seed` alone.

    Returns:
      The clip, or the reason why it can't be used: a file can't be read, or the clip has too few frames.
    """
    rng = random_of(record.id, config.seed)
    begun = copy.deepcopy(rng.bit_generator.state)
    first, end = record.frames or (0, None)
    used = record.references[: config.max_references]

    def choose(info: VideoInfo) -> Int[np.ndarray, " T"] | None:
        rng.bit_generator.state = begun
        times = info.times[first:]
        if config.fps:
            chosen = choose_by_time(times, config.num_frames, config.fps, rng)
        else:
            chosen = choose_frames(len(times) - 1, config.num_frames, config.stride, rng)
        return None if chosen is None else chosen + first

    size = (config.height, config.width)
    own = [r.frame for r in used if r.path == record.video and isinstance(r.frame, int)]
    wish = Wish(choose=choose, height=size[0], width=size[1], crop=record.crop, end=end, stills=own)
    try:
        read = read_clip(record.video, wish)
    except BoxError as error:
        return Skipped(id=record.id, reason=CROP_OUTSIDE, detail=str(error))
    except ValueError as error:
        return Skipped(id=record.id, reason=UNREADABLE_VIDEO, detail=str(error))
    times, chosen = read.info.times[first:], read.numbers
    if chosen is None:
        return _too_short(record, times, config)
    try:
        references = [
            load_reference(one, *size, augment=config.augment, rng=rng, still=_still(one, record, read)) for one in used
        ]
    except ValueError as error:
        return Skipped(id=record.id, reason=UNREADABLE_REFERENCE, detail=str(error))
    return Clip(
        record=record,
        video=read.frames,
        references=np.array([r.pixels for r in references], np.uint8).reshape(-1, *size, 3),
        subjects=np.array([r.subject for r in references], bool).reshape(-1, *size),
        subject_ids=subject_ids(used),
        metadata={
            **record.metadata,
            "fps": config.fps or _rate(times, chosen - first, read.info.fps, config.stride),
            "frames": chosen.tolist(),
            "subjects": [reference.subject for reference in used],
        }
        | ({"dropped": [dataclasses.asdict(entry) for entry in record.dropped]} if record.dropped else {}),
    )


def _still(reference: Reference, record: Record, read: Selection) -> Still | None:
    """The frame that a reference is cut from, if it was read with the clip."""
    own = reference.path == record.video and isinstance(reference.frame, int)
    return read.stills.get(int(reference.frame or 0)) if own else None


def _too_short(record: Record, times: Float[np.ndarray, " N+1"], config: PrepareConfig) -> Skipped:
    """Says that a clip, whose frames are shown at `times`, is too short."""
    T = config.num_frames
    if config.fps:
        length = times[-1] - times[0] if len(times) else 0.0
        reason = f"shorter than {T} frames at {config.fps:g} a second"
        detail = f"{record.video} shows the clip for {length:.2f} s; it must be above {(T - 1) / config.fps:.2f} s."
    else:
        reason = f"fewer than {T} frames"
        detail = f"{record.video} has {max(len(times) - 1, 0)} frames of the clip; {T} are needed."
    return Skipped(id=record.id, reason=reason, detail=detail)


def _rate(times: Float[np.ndarray, " N+1"], chosen: Int[np.ndarray, " T"], fps: float, stride: int) -> float:
    """Returns the average rate at which chosen frames were shown; `fps` is that of the video, 0 for unknown."""
    steps, apart = len(chosen) - 1, chosen[-1] - chosen[0]
    seconds = times[chosen[-1]] - times[chosen[0]]
    if not apart:
        return fps / stride
    if seconds <= 0 or (fps and abs(apart / fps - seconds) <= TICK):
        return float(fps * steps / apart)
    return float(np.round(steps / seconds, 6))


def choose_by_time(
    times: Float[np.ndarray, " N+1"], num_frames: int, fps: float, rng: np.random.Generator
) -> Int[np.ndarray, " T"] | None:
    """Chooses the frames of a clip of T frames at a rate of its own.

    The clip starts at a random frame. Frame k of it is the one on display k/fps seconds later: the last one whose time
    stamp is not above that, so a frame shown for longer than 1/fps is chosen more than once. Where the video's rate is
    constant and a multiple of `fps`, the choice is that of `choose_frames` with this multiple as the stride.

    Args:
      times: seconds, when each frame is shown and when the last one ends.
      num_frames: T.
      fps: frames of the clip a second.
      rng: draws the start.

    Returns:
      Frame numbers from 0 in ascending order; None for a video that ends before the clip would.
    """
    starts = np.flatnonzero(times[:-1] + (num_frames - 1) / fps + TICK < times[-1:])
    if not len(starts):
        return None
    stamps = times[starts[rng.integers(len(starts))]] + np.arange(num_frames) / fps
    return np.searchsorted(times[:-1], stamps + TICK, side="right") - 1


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
