"""A contact sheet of what preparation would choose, and why, before anything is encoded."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from refalign_jax.atomic import atomic_write
from refalign_jax.config import PrepareConfig
from refalign_jax.data.clips import Clip, load_record
from refalign_jax.data.records import Records, Skipped
from refalign_jax.data.skips import table
from refalign_jax.digests import Digests

TRIES = 20
"""Records that are looked at for each one to show, at most."""


def show(records: Records, config: PrepareConfig, count: int, out: Path) -> str:
    """Draws the first records as they would be encoded.

    Each row has the first, the middle and the last frame of a clip and its references. Beside them stand the masks and
    boxes that were left out, with the reason.

    Args:
      records: what a source yields.
      config: sizes and settings; the encoders are not opened.
      count: number of records to draw.
      out: the PNG file to write.

    Returns:
      Lines: what was drawn, and a table of the records that would be left out.

    Raises:
      ValueError: `out` can't be a PNG, or no record can be used.
    """
    if out.suffix != ".png" or not out.parent.is_dir():
        raise ValueError(f"--sheet {out} is no PNG in a folder that exists; name one, such as show.png.")
    clips: list[Clip] = []
    skipped: list[Skipped] = []
    with tempfile.TemporaryDirectory() as folder, Digests(folder) as digests:
        for record in records:
            found = load_record(record, config, digests)
            if isinstance(found, Skipped):
                skipped.append(found)
            else:
                clips.append(found)
            if len(clips) == count or len(clips) + len(skipped) == TRIES * count:
                break
    left_out = table(skipped)
    if not clips:
        first = f" The first: {skipped[0].detail or skipped[0].reason}" if skipped else ""
        raise ValueError(f"None of the first {len(skipped)} records can be used.{first}")
    with atomic_write(out) as temporary:
        draw(clips).savefig(temporary, format="png")
    seen = len(clips) + len(skipped)
    return f"{out} shows {len(clips)} of the first {seen} records." + (f"\n{left_out}" if left_out else "")


def draw(clips: list[Clip]) -> Figure:
    """Draws clips, one a row."""
    references = max(len(clip.references) for clip in clips)
    columns = 3 + references + 1
    h, w = clips[0].video.shape[1:3]
    side = 2.4
    figure = Figure(figsize=(side * columns + 1.2, (side * h / w + 0.75) * len(clips)), dpi=110, layout="constrained")
    grid = figure.subplots(len(clips), columns, squeeze=False, width_ratios=[*[1.0] * (columns - 1), 1.5])
    for axes, clip in zip(grid, clips, strict=True):
        for place in axes:
            place.axis("off")
        T = len(clip.video)
        numbers = clip.metadata["frames"]
        for place, index in zip(axes, (0, T // 2, T - 1), strict=False):
            place.imshow(clip.video[index])
            _title(place, f"frame {numbers[index]}")
        _title(axes[0], f"{_short(clip.record.id, 48)}\nframe {numbers[0]}, {clip.metadata['fps']:g} a second")
        _title(axes[1], f"{_short(clip.record.prompt, 48)}\nframe {numbers[T // 2]}")
        for place, image, used in zip(axes[3:], clip.references, clip.record.references, strict=False):
            place.imshow(np.asarray(image))
            place.axis("on")
            place.set(xticks=[], yticks=[])
            kind = "own clip, altered" if used.own_clip else "another clip or image"
            _title(place, f"{_short(used.subject or 'reference', 24)}, {kind}\n{used.why}")
        unused = [f"{used.subject}: beyond the number" for used in clip.record.references[len(clip.references) :]]
        lines = [f"{entry.subject}: {entry.reason} {entry.detail}" for entry in clip.record.dropped]
        shown = [_short(line, 58) for line in (*unused, *lines)]
        text = "\n".join(["left out:", *shown[:14], *(["…"] if len(shown) > 14 else [])]) if shown else ""
        axes[-1].text(0, 1, text, fontsize=6, va="top", parse_math=False)
    return figure


def _short(text: str, most: int) -> str:
    """The beginning of a text, as far as it can be drawn."""
    line = " ".join(text.split()).encode("utf-8", "replace").decode()
    return line if len(line) <= most else f"{line[: most - 1]}…"


def _title(place: object, text: str) -> None:
    """Writes above a picture."""
    place.set_title(text, fontsize=6.5, parse_math=False, loc="left")  # type: ignore[attr-defined]
