"""What a source of data yields: one `Record` per clip, or `Skipped` where it leaves a clip out.

A record names files and regions and holds no pixels; `clips.load_clip` reads it. A source is a function in a file of
sources/ that returns a list of records; `sources/jsonl.py` is the simplest.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from refalign_jax.data.video import Box
from refalign_jax.types import Int


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Reference:
    """A reference image: the file it comes from, and which part of it is the subject."""

    path: Path
    """An image, or a video where `frame` is given."""
    frame: int | None = None
    """Frame number in a video, from 0."""
    crop: Box | None = None
    """The region of the image that `box` and `mask` refer to; None for the whole image."""
    box: Box | None = None
    """Where the subject is, in pixels of `crop`; None for the extent of the mask or, without a mask, everything."""
    mask: Path | np.ndarray | None = None
    """The subject's pixels: an image file, or bool [rows, columns] of the size of `crop`; None for all pixels."""
    subject: str | None = None
    """Name of the subject; references of one name show one subject. None: a subject that no other reference shows."""
    own_clip: bool = False
    """Whether it was cut from the very clip that it conditions; such references are augmented."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Record:
    """One clip with its prompt and references, not read yet."""

    id: str
    """Unique in its source, and the same in every run."""
    video: Path
    """The video file."""
    prompt: str
    """What the clip shows."""
    references: tuple[Reference, ...] = ()
    """Best first; preparation uses the first `PrepareConfig.max_references`."""
    crop: Box | None = None
    """The region of the video's frames; None for whole frames."""
    frames: tuple[int, int] | None = None
    """First frame of the clip, and the first frame after it; None for the whole video."""
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """JSON that the prepared example keeps."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Skipped:
    """A clip that is left out."""

    id: str
    """The record's id."""
    reason: str
    """A few words, identical for all clips left out for this reason, since they are counted by it."""
    detail: str = ""
    """A sentence about this clip."""


def subject_ids(references: tuple[Reference, ...]) -> Int[np.ndarray, " R"]:
    """Numbers subjects, int32, in the order of their first references; a reference without a name gets its own."""
    numbers: dict[str | int, int] = {}
    keys = [index if reference.subject is None else reference.subject for index, reference in enumerate(references)]
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], np.int32)


def random_of(id: str, seed: int) -> np.random.Generator:
    """Returns a generator of random numbers that depends on an id and a seed alone."""
    digest = hashlib.sha256(id.encode()).digest()
    return np.random.default_rng([seed, *np.frombuffer(digest, np.uint32).tolist()])
