"""What a source of data yields: one `Record` per clip, or `Skipped` where it leaves a clip out.

A record names files and regions and holds no pixels; `clips.load_clip` reads it. A source is anything that can be
iterated over, more than once, in the same order: a list of records, as `sources/jsonl.py` returns, or an object that
reads a file too large to be held. The latter may yield entries, which become records only where they are used, in
another thread or process.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np

from refalign_jax.data.stored import File, need
from refalign_jax.data.video import Box
from refalign_jax.types import Bool, Int

_COUNTS = re.compile(r"(?:[P-o]{0,6}[0-O])+")
"""COCO's coding of run lengths: six bits a character from 0 on, the highest of which says that another follows."""


@dataclasses.dataclass(frozen=True)
class RunLengths:
    """A mask as COCO stores it: run lengths down the columns, coded as text."""

    size: tuple[int, int]
    """Rows and columns."""
    counts: str

    def decode(self) -> Bool[np.ndarray, "h w"]:
        """Returns the mask, true on the subject.

        Raises:
          ValueError: the runs do not fill the size, or pycocotools is not installed.
        """
        what = f"a mask of {self.size[1]}x{self.size[0]} can't be decoded"
        if not _COUNTS.fullmatch(self.counts):  # the decoder would read beyond the end of such a text
            raise ValueError(f"{what}: it is not COCO's coding.")
        runs = self._runs()
        if runs.min() < 0 or runs.sum() != self.size[0] * self.size[1]:
            raise ValueError(f"{what}: its runs have {runs.sum()} pixels.")  # the decoder would fill the rest
        coco = need("pycocotools.mask")
        try:
            return coco.decode({"size": list(self.size), "counts": self.counts}).astype(bool)
        except (ValueError, TypeError, OverflowError, MemoryError) as error:
            raise ValueError(f"{what}: {error}.") from error

    def _runs(self) -> Int[np.ndarray, " runs"]:
        """The run lengths: five bits a character, the lowest first, with a sign; from the fourth on differences."""
        codes = np.frombuffer(self.counts.encode(), np.uint8).astype(np.int64) - 48
        ends = np.flatnonzero(codes < 32)
        starts = np.append(0, ends[:-1] + 1)
        digits = np.arange(len(codes)) - np.repeat(starts, ends - starts + 1)
        values = np.add.reduceat((codes & 31) << 5 * digits, starts)
        values -= np.where(codes[ends] & 16, 1 << 5 * (ends - starts + 1), 0)
        values[1::2] = np.cumsum(values[1::2])
        values[2::2] = np.cumsum(values[2::2])
        return values


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Reference:
    """A reference image: the file it comes from, and which part of it is the subject."""

    path: File
    """An image, or a video where `frame` is given."""
    frame: int | float | None = None
    """Frame number in a video, from 0; or, as a float in [0, 1], the fraction of the frames that come before it."""
    crop: Box | None = None
    """The region of the image that `box` and `mask` refer to; None for the whole image."""
    box: Box | None = None
    """Where the subject is, in pixels of `crop`; None for the extent of the mask or, without a mask, everything."""
    box_size: tuple[int, int] | None = None
    """Width and height of the picture in whose pixels `box` counts; None for those of `crop`."""
    mask: File | np.ndarray | RunLengths | None = None
    """The subject's pixels: an image file, or bool [rows, columns] of the size of `crop`; None for all pixels."""
    subject: str | None = None
    """Name of the subject; references of one name show one subject. None: a subject that no other reference shows."""
    own_clip: bool = False
    """Whether it was cut from the very clip that it conditions; such references are augmented."""
    why: str = ""
    """Why it was chosen, in a few words; a contact sheet shows it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dropped:
    """A reference that a record could have had and that is left out."""

    subject: str
    """Its name."""
    reason: str
    """A few words, identical for all references left out for this reason."""
    detail: str = ""
    """What was found, such as a score."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Record:
    """One clip with its prompt and references, not read yet."""

    id: str
    """Unique in its source, and the same in every run."""
    video: File
    """The video file."""
    prompt: str
    """What the clip shows."""
    references: tuple[Reference, ...] = ()
    """Best first; preparation uses the first `PrepareConfig.max_references`."""
    crop: Box | None = None
    """The region of the video's frames; None for whole frames."""
    frames: tuple[int, int] | None = None
    """First frame of the clip, and the first frame after it; None for the whole video."""
    dropped: tuple[Dropped, ...] = ()
    """References that were left out, and why."""
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


class Entry(Protocol):
    """One entry of a source's file, not parsed yet; it can be pickled."""

    @property
    def id(self) -> str:
        """The id of the record that it becomes."""
        ...

    def read(self) -> Record | Skipped:
        """Parses it; the result depends on the entry alone."""
        ...


Records = Iterable[Record | Skipped | Entry]
"""What a source is. `operator.length_hint` of it is the number of records, or an estimate; 0 for unknown."""


def subject_ids(references: tuple[Reference, ...]) -> Int[np.ndarray, " R"]:
    """Numbers subjects, int32, in the order of their first references; a reference without a name gets its own."""
    numbers: dict[str | int, int] = {}
    keys = [index if reference.subject is None else reference.subject for index, reference in enumerate(references)]
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], np.int32)
