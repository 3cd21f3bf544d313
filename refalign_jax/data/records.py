"""What a source of data says of one clip, whatever the source, and the simplest source: a JSONL file of one's own.

    {"video": "clips/cat.mp4", "prompt": "A cat walks over grass.",
     "references": [{"image": "cat.png", "mask": "cat_mask.png", "subject": "cat"}]}

one such object a line; `mask` and `subject` may be left out. Paths are relative to the folder of the file.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from refalign_jax.data.video import Box


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Reference:
    """Where a reference image comes from and what of it is the subject."""

    path: Path
    """An image, or a video where `frame` is given."""
    frame: int | None = None
    """The frame number, from 0, of a video."""
    crop: Box | None = None
    """The region that `box` and `mask` are given in; None for the whole image."""
    box: Box | None = None
    """Where in it the subject is; None for where the mask is, or everywhere."""
    mask: Path | np.ndarray | None = None
    """The subject's pixels: an image file, or bool [rows, columns] of the size of `crop`."""
    subject: str | None = None
    """Who it is; references of one name show one subject. None: a subject of its own."""
    own_clip: bool = False
    """Whether it was cut from the very clip that it conditions; such references are altered."""


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
    """Best first; the first few are used."""
    crop: Box | None = None
    """The region of the video's frames; None for all of them."""
    frames: tuple[int, int] | None = None
    """First frame of the clip and the first after it; None for the whole video."""
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """JSON that the prepared example keeps."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Skipped:
    """A clip that is left out."""

    id: str
    reason: str
    """A few words, the same for all clips that are left out for this reason: they are counted."""
    detail: str = ""
    """A sentence about this one."""


def subject_ids(references: tuple[Reference, ...]) -> np.ndarray:
    """Numbers subjects in the order of their first references, int32 [R]; a nameless one is nobody else."""
    numbers: dict[str | int, int] = {}
    keys = [index if reference.subject is None else reference.subject for index, reference in enumerate(references)]
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], np.int32)


def read_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Yields what the lines of a JSONL file hold, each with its number from 1; empty lines are passed over.

    Raises:
      ValueError: no such file, or a line that is not JSON.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # `splitlines` would also cut at U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} can't be read as UTF-8 text: {getattr(error, 'strerror', None) or error}.") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}.") from error
        yield number, fields


def check_fields(value: Any, known: Mapping[str, bool], where: str) -> None:
    """Raises ValueError unless `value` is an object with the fields that must be there and no others."""
    form = "{" + ", ".join(f'"{name}"' + ("" if needed else "?") for name, needed in known.items()) + "}"
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {value!r:.60}; it must be an object {form}.")
    missing = [name for name, needed in known.items() if needed and name not in value]
    unknown = [name for name in value if name not in known]
    if missing:
        raise ValueError(f"{where} has no field {missing[0]!r}; it must be {form}.")
    if unknown:
        raise ValueError(f"{where} has the unknown field {unknown[0]!r}; it must be {form}.")


def check_text(value: Any, name: str, where: str, empty: bool = False) -> None:
    """Raises ValueError unless `value` is a string, not empty unless that is allowed."""
    if not isinstance(value, str) or not (value or empty):
        raise ValueError(f"{where}: {name} is {value!r:.60}; it must be a string{'' if empty else ' and not empty'}.")
