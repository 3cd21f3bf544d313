"""Phantom-Data: clips of Koala-36M, each with references that show its subjects in other clips of the same film.

Two parquet files. The annotations have `video_id` (or `vid`), `video_caption`, and `cross_pair`, JSON as text:

    {phrase: {"obj_from_tgt_video": […], "refer_result": [[{vid, frame_idx, bbox_loc, bbox_cls, scores}, …], …]}}

`refer_result` is a list of lists and `bbox_loc` a box within one or more lists; a flatter form is read as well. The
reference is frame ⌊frame_idx·N⌋ of the N frames of clip `vid`; `frame_idx`, a fraction, may be text. The box counts
pixels of that frame shrunk, never enlarged, to a long side of 768; one that reaches beyond it is wrong and is dropped.
The metadata have `vid`, `width` and `height`; a table of them is kept beside the dataset.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from refalign_jax.config import PhantomConfig
from refalign_jax.data.records import Dropped, Record, Reference, Skipped
from refalign_jax.data.sources.index import build, query, state_of
from refalign_jax.data.sources.videos import Videos, open_videos
from refalign_jax.data.stored import File, need, open_bytes
from refalign_jax.data.video import Box

LONG_SIDE = 768
"""Pixels to which the long side of an annotated frame was shrunk."""
ROWS = 256
"""Rows of a parquet file that are read at once."""
NOT_IN_FORM = "the row is not in the form of Phantom-Data"
NO_CAPTION = "the caption is empty"
NO_VIDEO = "the video is not there"
NO_REFERENCE = "no reference is left"
BEYOND = "the box reaches beyond the frame"
NOT_A_BOX = "the reference is not in the form of Phantom-Data"
NO_SIZE = "its clip is not in the metadata"
CLIP_GONE = "its clip's video is not there"
OVERLAPS = "overlaps an earlier one"


@dataclasses.dataclass(frozen=True)
class Phantom:
    """Records of Phantom-Data; iterating over it yields entries, which can be pickled."""

    annotations: str
    """Parquet file, a path or URL."""
    videos: Videos
    config: PhantomConfig
    sizes: Path
    """Table of the clips' width and height."""
    notes: tuple[str, ...] = ()
    """Sentences on archives that are cut."""

    def __iter__(self) -> Iterator[PhantomEntry]:
        with open_bytes(self.annotations) as file:
            table = _open_parquet(file, self.annotations)
            named = "video_id" if "video_id" in table.schema_arrow.names else "vid"
            for batch in _batches(table, [named, "video_caption", "cross_pair"], self.annotations):
                for id, caption, pairs in batch:
                    yield PhantomEntry(str(id), str(caption or ""), pairs, self)

    def __length_hint__(self) -> int:
        return _count(self.annotations)

    def find(self, vid: str) -> File | None:
        """Returns a clip's video; None if it is nowhere."""
        uuid, start, end, *_ = *vid.rsplit("_", 2), "", ""
        return self.videos.find(self.config.pattern.format(vid=vid, uuid=uuid, start=start, end=end))


@dataclasses.dataclass(frozen=True)
class PhantomEntry:
    """One row, not parsed yet."""

    id: str
    """`video_id`."""
    caption: str
    pairs: Any
    """`cross_pair`."""
    source: Phantom

    def read(self) -> Record | Skipped:
        """Parses it and finds its references."""
        if not self.caption.strip():
            return Skipped(id=self.id, reason=NO_CAPTION, detail=f"{self.id} has no video_caption.")
        try:
            phrases = json.loads(self.pairs) if isinstance(self.pairs, str | bytes) else self.pairs
            entries = [(phrase, _flat(found.get("refer_result"))) for phrase, found in phrases.items()]
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            return Skipped(id=self.id, reason=NOT_IN_FORM, detail=f"{self.id}: cross_pair: {error!r}.")
        video = self.source.find(self.id)
        if video is None:
            return Skipped(id=self.id, reason=NO_VIDEO, detail=f"{self.id} is not in {self.source.videos.root}.")
        kept, dropped = self._references(entries)
        if not kept:
            reasons = ", ".join(sorted({entry.reason for entry in dropped})) or "it has none"
            return Skipped(id=self.id, reason=NO_REFERENCE, detail=f"{self.id}: {reasons}.")
        return Record(
            id=self.id,
            video=video,
            prompt=self.caption,
            references=tuple(kept),
            dropped=tuple(dropped),
            metadata={"source": "Phantom-Data", "references_from": [reference.path.name for reference in kept]},
        )

    def _references(self, entries: list[tuple[str, list[Any]]]) -> tuple[list[Reference], list[Dropped]]:
        """Takes the first reference of each phrase that can be used, in the order of the phrases."""
        kept: list[Reference] = []
        dropped: list[Dropped] = []
        for phrase, found in entries:
            for entry in found:
                reference = self._reference(phrase, entry)
                same = [other for other in kept if isinstance(reference, Reference) and _same_frame(other, reference)]
                if isinstance(reference, Reference) and any(
                    _overlap(reference.box, other.box) >= self.source.config.max_overlap for other in same
                ):
                    dropped.append(Dropped(subject=phrase, reason=OVERLAPS))
                elif isinstance(reference, Reference):
                    kept.append(reference)
                    break
                else:
                    dropped.append(reference)
        return kept, dropped

    def _reference(self, phrase: str, entry: Any) -> Reference | Dropped:
        """Reads one reference."""
        try:
            vid, moment, corners = str(entry["vid"]), float(entry["frame_idx"]), _corners(entry["bbox_loc"])
        except (LookupError, TypeError, ValueError) as error:
            return Dropped(subject=phrase, reason=NOT_A_BOX, detail=repr(error))
        if not (0 <= moment <= 1 and all(map(math.isfinite, corners))):
            return Dropped(subject=phrase, reason=NOT_A_BOX, detail=f"frame {moment}, box {corners}")
        rows = query(self.source.sizes, "SELECT width, height FROM found WHERE vid = ?", vid)
        if not rows:
            return Dropped(subject=phrase, reason=NO_SIZE, detail=vid)
        columns, lines = shrunk(*rows[0])
        left, top, right, bottom = math.floor(corners[0]), math.floor(corners[1]), *map(math.ceil, corners[2:])
        if not (-1 <= left < right <= columns + 1 and -1 <= top < bottom <= lines + 1):
            detail = f"{corners} in {columns}x{lines}"
            return Dropped(subject=phrase, reason=BEYOND, detail=detail)
        video = self.source.find(vid)
        if video is None:
            return Dropped(subject=phrase, reason=CLIP_GONE, detail=vid)
        box = max(left, 0), max(top, 0), min(right, columns), min(bottom, lines)
        own = vid == self.id
        return Reference(path=video, frame=moment, box=box, box_size=(columns, lines), subject=phrase, own_clip=own)


def shrunk(width: int, height: int) -> tuple[int, int]:
    """Columns and rows of a frame shrunk to a long side of `LONG_SIDE`; a smaller one stays as it is."""
    if max(width, height) <= LONG_SIDE:
        return width, height
    if width > height:
        return LONG_SIDE, max(int(LONG_SIDE / width * height), 1)
    return max(int(LONG_SIDE / height * width), 1), LONG_SIDE


def _flat(found: Any) -> list[Any]:
    """The references of a phrase, out of a list of lists or of a list."""
    return [entry for group in found or [] for entry in (group if isinstance(group, list) else [group])]


def _corners(box: Any) -> list[float]:
    """Left, top, right and bottom of a box, out of the lists that it lies in."""
    while isinstance(box, list) and len(box) == 1:
        box = box[0]
    if not isinstance(box, list) or len(box) != 4:
        raise ValueError(f"{box!r:.60} is not a box")
    return [float(place) for place in box]


def _same_frame(first: Reference, second: Reference) -> bool:
    """Whether two references are cut from one frame."""
    return first.path == second.path and first.frame == second.frame


def _overlap(first: Box | None, second: Box | None) -> float:
    """Area that two boxes share, as a fraction of the smaller one."""
    assert first is not None
    assert second is not None
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return max(width, 0) * max(height, 0) / min(areas)


def open_phantom(annotations: str, config: PhantomConfig, folder: Path) -> Phantom:
    """Opens the data set.

    Args:
      annotations: the parquet file with `video_id`, `video_caption` and `cross_pair`.
      config: where clips and metadata are.
      folder: where tables of archives and metadata are kept.

    Raises:
      ValueError: a file does not exist or lacks a column, or a package is missing.
    """
    with open_bytes(annotations) as file:
        names = _open_parquet(file, annotations).schema_arrow.names
    missing = [name for name in ("video_caption", "cross_pair") if name not in names]
    missing += [] if {"video_id", "vid"} & {*names} else ["video_id"]
    if missing:
        raise ValueError(f"{annotations} has no column {missing[0]}; expected Phantom-Data's annotations.")
    videos, notes = open_videos(config.videos, folder)
    sizes = folder / "sizes.sqlite"
    columns = "vid TEXT PRIMARY KEY, width INTEGER, height INTEGER"
    build(sizes, columns, state_of([config.metadata]), lambda: _sizes(config.metadata))
    return Phantom(annotations, videos, config, sizes, tuple(notes))


def _sizes(place: str) -> Iterator[tuple[str, int, int]]:
    """Yields the size of every clip in the metadata that has one."""
    with open_bytes(place) as file:
        table = _open_parquet(file, place)
        missing = [name for name in ("vid", "width", "height") if name not in table.schema_arrow.names]
        if missing:
            raise ValueError(f"{place} has no column {missing[0]}; expected Phantom-Data's metadata.")
        for batch in _batches(table, ["vid", "width", "height"], place):
            for vid, width, height in batch:
                if width and height:
                    yield str(vid), int(width), int(height)


def _open_parquet(file: Any, place: str) -> Any:
    """Opens a parquet file by its pages, so that a row group is never held as a whole."""
    arrow, parquet = need("pyarrow"), need("pyarrow.parquet")
    try:
        return parquet.ParquetFile(arrow.PythonFile(file, mode="r"), buffer_size=1 << 20, pre_buffer=False)
    except arrow.ArrowException as error:
        raise ValueError(f"{place} is not a parquet file that can be read: {str(error).splitlines()[0]}.") from error


def _batches(table: Any, columns: list[str], place: str) -> Iterator[list[tuple[Any, ...]]]:
    """Yields some rows at a time."""
    try:
        for batch in table.iter_batches(batch_size=ROWS, columns=columns, use_threads=False):
            yield list(zip(*(batch.column(name).to_pylist() for name in columns), strict=True))
    except need("pyarrow").ArrowException as error:
        raise ValueError(f"{place} can't be read on: {str(error).splitlines()[0]}.") from error


@functools.lru_cache(maxsize=4)
def _count(place: str) -> int:
    """Number of rows of a parquet file."""
    with open_bytes(place) as file:
        return _open_parquet(file, place).metadata.num_rows
