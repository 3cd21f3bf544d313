"""OpenS2V-5M, versions 1.0 and 1.1: a clip per entry, with masks of what one of its frames shows.

Files: `<part>.json`, or `<part>.json.zip`, an object of id to record; videos in folders or tars (videos.py). What is
read of a record:

    metadata.path, .crop [left, right, top, bottom], .face_cut [first frame, frame after the last], .face_cap_qwen
    annotation.ann_frame_data.ann_frame_idx, .annotations[n − 1] {aes_score, gme_score}
    annotation.mask_map[n] {class_name}, .mask_annotation[frame][n] {size, counts}: COCO's run lengths, within the crop

References are chosen as published: those whose aesthetic or GME score is high enough and whose rectangle is large
enough, the largest first; one whose mask overlaps an earlier one is dropped. With a probability they come from another
clip of the same subjects (pairs.py). Every choice is drawn from the seed and the record's id.
"""

from __future__ import annotations

import dataclasses
import functools
import glob
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from refalign_jax import remote
from refalign_jax.config import OpenS2VConfig
from refalign_jax.data.clips import CROP_OUTSIDE
from refalign_jax.data.records import Dropped, Record, Reference, RunLengths, Skipped
from refalign_jax.data.seeds import random_of
from refalign_jax.data.sources.json_stream import BrokenFileError, estimate_entries, parse, read_entries
from refalign_jax.data.sources.pairs import Pairs, open_pairs, part_of
from refalign_jax.data.sources.videos import Videos, open_videos
from refalign_jax.data.stored import File, need, size_of
from refalign_jax.data.video import Box

CUT_FILE = "the rest of a JSON file is cut off or damaged"
NOT_IN_FORM = "the record is not in the form of OpenS2V-5M"
NO_CAPTION = "the caption is empty"
NO_VIDEO = "the video is not there"
WRONG_MASK = "a mask has another size than the frame"
BROKEN_MASK = "a mask can't be decoded"
NO_REFERENCE = "no reference is left"
UNKNOWN_PAIR = "a pair names an unknown clip"
OVERLAPS = "overlaps a larger one"


class FormError(ValueError):
    """A record is not in the form that is documented."""


@dataclasses.dataclass(frozen=True)
class OpenS2V:
    """Records of OpenS2V-5M; iterating over it yields entries, which can be pickled.

    Args:
      jsons: the JSON files.
      videos: finds videos.
      config: the choice of references.
      seed: of every random choice.
      pairs: cross-clip pairs; None for none.
      notes: sentences on archives that are cut.
    """

    jsons: tuple[str, ...]
    videos: Videos
    config: OpenS2VConfig
    seed: int = 0
    pairs: Pairs | None = None
    notes: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[OpenS2VEntry | Skipped]:
        for place in self.jsons:
            part = part_of(place)
            try:
                for entry in read_entries(place):
                    yield OpenS2VEntry(f"{part}/{entry.key}", entry.value, self)
            except BrokenFileError as error:
                yield Skipped(id=place, reason=CUT_FILE, detail=str(error))

    def __length_hint__(self) -> int:
        return _estimate(self.jsons)


@dataclasses.dataclass(frozen=True)
class OpenS2VEntry:
    """One record, not parsed yet."""

    id: str
    """`<part>/<key>`."""
    value: bytes
    source: OpenS2V

    def read(self) -> Record | Skipped:
        """Parses it and chooses its references."""
        try:
            clip = _Annotated.parse(self.id, self.value)
        except (LookupError, TypeError, ValueError) as error:
            detail = f"{self.id}: {error}." if isinstance(error, FormError) else f"{self.id}: {error!r}."
            return Skipped(id=self.id, reason=NOT_IN_FORM, detail=detail)
        if not clip.caption.strip():
            return Skipped(id=self.id, reason=NO_CAPTION, detail=f"{self.id} has no face_cap_qwen.")
        columns, rows = clip.resolution or (clip.crop[2], clip.crop[3])
        left, top, right, bottom = clip.crop
        if not (0 <= left < right <= columns and 0 <= top < bottom <= rows):
            detail = f"{self.id} is cropped to {left} to {right}, {top} to {bottom}; its frames are {columns}x{rows}."
            return Skipped(id=self.id, reason=CROP_OUTSIDE, detail=detail)
        video = self.source.videos.find(clip.path, self.id.split("/", 1)[0])
        if video is None:
            return Skipped(id=self.id, reason=NO_VIDEO, detail=f"{clip.path} is not in {self.source.videos.root}.")
        choice = self._choose(clip, video)
        if isinstance(choice, Skipped):
            return choice
        return Record(
            id=self.id,
            video=video,
            prompt=clip.caption,
            references=choice.references,
            crop=clip.crop,
            frames=clip.cut,
            dropped=tuple(choice.dropped),
            metadata={"source": "OpenS2V-5M", "video": clip.path, "references_from": choice.clip},
        )

    def _choose(self, clip: _Annotated, video: File) -> _Choice | Skipped:
        """Chooses references of another clip where that is drawn, else of the clip itself."""
        config, pairs = self.source.config, self.source.pairs
        rng = random_of(f"{self.id} references", self.source.seed)
        found = pairs.of(self.id) if pairs is not None and rng.random() < config.cross_probability else []
        if found and pairs is not None:
            names = sorted({pair.other for pair in found})
            other = names[rng.integers(len(names))]
            value = pairs.record(other)
            if value is None:
                return Skipped(id=self.id, reason=UNKNOWN_PAIR, detail=f"{self.id} is paired with {other}.")
            allowed = frozenset(pair.other_class for pair in found if pair.other == other)
            cross = self._choose_cross(other, value, allowed)
            if cross is not None:
                return cross
        return choose(clip, video, config, own_clip=True)

    def _choose_cross(self, id: str, value: bytes, allowed: frozenset[str]) -> _Choice | None:
        """Chooses among some masks of another clip; None where none of them can be used."""
        try:
            other = _Annotated.parse(id, value)
        except (LookupError, TypeError, ValueError):
            return None
        video = self.source.videos.find(other.path, id.split("/", 1)[0])
        if video is None:
            return None
        masks = {number: mask for number, mask in other.masks.items() if number in allowed}
        found = choose(dataclasses.replace(other, masks=masks), video, self.source.config, own_clip=False)
        return None if isinstance(found, Skipped) else found


@dataclasses.dataclass(frozen=True)
class _Choice:
    """The references of a clip, and what was left out."""

    clip: str
    """The clip that they come from."""
    references: tuple[Reference, ...]
    dropped: list[Dropped]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Annotated:
    """What is used of a record."""

    id: str
    path: str
    crop: Box
    """Left, top, right, bottom."""
    resolution: tuple[int, int] | None
    """Columns and rows of the video's frames; None where the record does not say."""
    cut: tuple[int, int]
    caption: str
    frame: int
    """Number of the frame that masks belong to."""
    masks: Mapping[str, RunLengths]
    names: Mapping[str, str]
    scores: Mapping[str, tuple[float, float]]
    """Aesthetic and GME score of each mask."""

    @classmethod
    def parse(cls, id: str, value: bytes) -> _Annotated:
        """Parses a record.

        Raises:
          LookupError, TypeError, ValueError: it is not in the form that this module describes.
        """
        record: Any = parse(value)
        about = record["metadata"]
        if "annotation" not in record:
            raise FormError("it has no annotation; name the JSON files of mask_and_bbox")
        annotation = record["annotation"]
        frame_data = annotation["ann_frame_data"]
        frame, scored = int(frame_data["ann_frame_idx"]), frame_data["annotations"]
        left, right, top, bottom = (int(place) for place in about["crop"])
        first, end = (int(place) for place in about.get("face_cut") or about["cut"])
        if not 0 <= first < end or frame < 0:
            raise FormError(f"its frames {first} to {end} or its annotated frame {frame} can't be")
        caption = about.get("face_cap_qwen") or ""
        caption = caption[0] if isinstance(caption, list) else caption
        size = about.get("resolution")
        masks = annotation["mask_annotation"].get(str(frame), {})
        wrong = [number for number in masks if not 1 <= int(number) <= len(scored)]
        if wrong or not isinstance(caption, str) or not isinstance(about["path"], str):
            raise FormError(f"the mask {wrong[0]} has no scores" if wrong else "its caption or path is no text")
        scores = {number: scored[int(number) - 1] for number in masks}
        return cls(
            id=id,
            path=about["path"],
            crop=(left, top, right, bottom),
            resolution=(int(size["width"]), int(size["height"])) if size else None,
            cut=(first, end),
            caption=caption,
            frame=frame,
            masks={n: RunLengths((int(m["size"][0]), int(m["size"][1])), str(m["counts"])) for n, m in masks.items()},
            names={number: str(annotation["mask_map"][number]["class_name"]) for number in masks},
            scores={n: (float(s.get("aes_score") or 0), float(s.get("gme_score") or 0)) for n, s in scores.items()},
        )


def choose(clip: _Annotated, video: File, config: OpenS2VConfig, own_clip: bool) -> _Choice | Skipped:
    """Chooses the references of a clip among its masks.

    Returns:
      The references, the largest first, and what was left out; or why the clip can't be used.
    """
    coco = need("pycocotools.mask")
    rows, columns = clip.crop[3] - clip.crop[1], clip.crop[2] - clip.crop[0]
    dropped: list[Dropped] = []
    candidates: list[tuple[float, int, str, dict[str, Any]]] = []
    why: dict[str, str] = {}
    for number, mask in clip.masks.items():
        name, (aesthetic, gme) = _name(clip, number), clip.scores[number]
        scores = f"aesthetic {aesthetic:.2f}, GME {gme:.2f}"
        if mask.size != (rows, columns):
            detail = f"{clip.id}: the mask of {name} is {mask.size[1]}x{mask.size[0]}, the frame {columns}x{rows}."
            return Skipped(id=clip.id, reason=WRONG_MASK, detail=detail)
        if aesthetic < config.min_aesthetic and gme < config.min_gme:
            dropped.append(Dropped(subject=name, reason="scores too low", detail=scores))
            continue
        try:
            mask.decode()
        except ValueError as error:
            return Skipped(id=clip.id, reason=BROKEN_MASK, detail=f"{clip.id}, {name}: {error}")
        coded = {"size": list(mask.size), "counts": mask.counts}
        _, _, width, height = coco.toBbox(coded).tolist()
        area = width * height / (rows * columns)
        if not area:
            dropped.append(Dropped(subject=name, reason="empty mask"))
        elif area < config.min_area:
            dropped.append(Dropped(subject=name, reason="too small", detail=f"{area:.3f} of the frame"))
        else:
            candidates.append((-area, int(number), number, coded))
            why[number] = f"area {area:.2f}, {scores}"
    kept: list[tuple[str, dict[str, Any]]] = []
    for _, _, number, coded in sorted(candidates, key=lambda found: found[:2]):
        larger = next((other for other, mask in kept if _overlap(coco, coded, mask) >= config.max_overlap), None)
        if larger is None:
            kept.append((number, coded))
        else:
            dropped.append(Dropped(subject=_name(clip, number), reason=OVERLAPS, detail=_name(clip, larger)))
    if not kept:
        reasons = ", ".join(sorted({entry.reason for entry in dropped})) or "no mask"
        return Skipped(id=clip.id, reason=NO_REFERENCE, detail=f"{clip.id} has {len(clip.masks)} masks: {reasons}.")
    references = tuple(
        Reference(
            path=video,
            frame=clip.frame,
            crop=clip.crop,
            mask=clip.masks[number],
            subject=_name(clip, number),
            own_clip=own_clip,
            why=why[number],
        )
        for number, _ in kept
    )
    return _Choice(clip.id, references, dropped)


def _name(clip: _Annotated, number: str) -> str:
    """The name of a subject, unlike those of others with the same class."""
    return f"{clip.names[number]} ({number})"


def _overlap(coco: Any, first: dict[str, Any], second: dict[str, Any]) -> float:
    """Pixels that two masks share, as a fraction of the smaller one."""
    smaller = min(int(coco.area(first)), int(coco.area(second)))
    return int(coco.area(coco.merge([first, second], intersect=True))) / max(smaller, 1)


def open_opens2v(records: str, config: OpenS2VConfig, folder: Path, seed: int) -> OpenS2V:
    """Opens the data set.

    Args:
      records: a JSON file, a zip of one, or a folder of them.
      config: where the videos and pairs are, and the choice of references.
      folder: where tables of archives and pairs are kept.
      seed: of every random choice.

    Raises:
      ValueError: a file or folder does not exist or is not of its kind, or a package is missing.
    """
    need("pycocotools.mask")
    jsons = sorted(glob.glob(os.path.join(glob.escape(records), "*.json*"))) if os.path.isdir(records) else [records]
    jsons = [place for place in jsons if place.endswith((".json", ".json.zip"))]
    if not jsons:
        raise ValueError(f"{records} holds no JSON file; name OpenS2V-5M's mask_and_bbox files or their folder.")
    for place in jsons:
        size_of(place)
        if not remote.is_remote(place) and not os.path.isfile(place):
            raise ValueError(f"{place} is not a file; expected OpenS2V-5M's JSON.")
    videos, notes = open_videos(config.videos, folder)
    pairs = open_pairs(config, jsons, folder) if config.pairs and config.cross_probability else None
    return OpenS2V(tuple(jsons), videos, config, seed, pairs, tuple(notes))


@functools.lru_cache(maxsize=4)
def _estimate(jsons: tuple[str, ...]) -> int:
    """About how many entries files have together."""
    return sum(map(estimate_entries, jsons))
