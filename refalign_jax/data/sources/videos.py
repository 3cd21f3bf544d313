"""Videos by name, in folders or in tars, which may be split and lie at URLs; none is unpacked.

`x.tar.split.000`, `x.tar.split.001`, … are one tar, cut anywhere. One pass over its headers, which skips what lies
between them, gives the place of every video; a table of them is kept beside the dataset.
"""

from __future__ import annotations

import dataclasses
import io
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from refalign_jax import remote
from refalign_jax.data.sources.index import build, query, state_of
from refalign_jax.data.stored import File, JoinedFile, Stored, need

_SPLIT = re.compile(r"(.*\.tar)(?:(?:\.(?:split|part))?[._-](\d+)|\.(?:split|part)[._-]([a-z]{2,3}))?", re.DOTALL)
"""A tar, or a piece of one that was split, with its number or letters."""
_SLACK = 1 << 16
"""Zeros that may follow the last member of a tar."""


@dataclasses.dataclass(frozen=True)
class Videos:
    """Finds videos; it can be pickled."""

    root: str
    table: Path | None
    """What lies in tars or at a URL; None where there are only files of a local folder."""

    def find(self, path: str, part: str = "") -> File | None:
        """Returns where a video is; None if it is nowhere.

        Args:
          path: as the data set names it.
          part: the part of the data set, whose folder or tar is looked into first.
        """
        clean = os.path.normpath(path)
        if clean.startswith(("/", "..")):
            return None
        if not remote.is_remote(self.root):
            for place in (Path(self.root, part, clean), Path(self.root, clean)):
                if place.is_file():
                    return place
        if self.table is None:
            return None
        rows = query(self.table, "SELECT name, pieces FROM found WHERE base = ?", os.path.basename(clean))
        ends = [(name, pieces) for name, pieces in rows if f"/{name}".endswith(f"/{clean}")]
        ends.sort(key=lambda row: (part not in row[0].split("/"), row[0]))
        return Stored(*_decode(*ends[0])) if ends else None


def _decode(name: str, pieces: str) -> tuple[str, tuple[tuple[str, int, int | None], ...]]:
    """A row of the table as the fields of `Stored`."""
    rows = [line.rsplit("\t", 2) for line in pieces.split("\n")]
    return name, tuple((place, int(start), int(length) if length else None) for place, start, length in rows)


def open_videos(root: str, folder: Path) -> tuple[Videos, list[str]]:
    """Makes the table of what lies in tars or at a URL.

    Args:
      root: a folder, a tar, one piece of a split tar, or a URL of these.
      folder: where the table is kept.

    Returns:
      The videos, and a sentence for every tar that is cut or damaged; what lies before that place can be used.

    Raises:
      ValueError: nothing is there.
    """
    archives, files = _list(root)
    if not archives and not remote.is_remote(root):
        return Videos(root, None), []
    table = folder / "videos.sqlite"
    state = [root, sorted(files), state_of(place for places in archives.values() for place in places)]
    columns = "key TEXT PRIMARY KEY, name TEXT, base TEXT, pieces TEXT, note TEXT"

    def rows() -> Iterator[tuple[Any, ...]]:
        for place in files:
            name = place.removeprefix(root).strip("/")
            yield place, name, os.path.basename(name), f"{place}\t0\t", ""
        for archive, places in archives.items():
            part = os.path.basename(archive).removesuffix(".tar")
            yield from _members(archive, part, places)

    build(table, columns, state, rows, also="base")
    return Videos(root, table), [note for (note,) in query(table, "SELECT note FROM found WHERE note > ''")]


def _list(root: str) -> tuple[dict[str, list[str]], list[str]]:
    """Lists tars, each with its pieces in order, and the other files of a URL."""
    if remote.is_remote(root):
        system, path = need("fsspec").core.url_to_fs(root)
        try:
            names = [system.unstrip_protocol(name) for name in system.find(path)]
        except Exception as error:
            if not isinstance(error, OSError) and not remote.is_answer(error):
                raise
            raise ValueError(f"{root} can't be listed: {remote.reason(error)}.") from error
    elif os.path.isdir(root):
        names = [str(path) for pattern in ("*.tar*", "*/*.tar*", "*/*/*.tar*") for path in Path(root).glob(pattern)]
    elif os.path.isfile(root):
        start = _SPLIT.fullmatch(root)
        names = [str(path) for path in Path(root).parent.iterdir()] if start else []
        names = [name for name in names if (found := _SPLIT.fullmatch(name)) and start and found[1] == start[1]]
        if not names:
            raise ValueError(f"{root} is neither a folder nor a tar; name the folder that holds the videos.")
    else:
        raise ValueError(f"{root} does not exist; expected the folder, tar or URL of the videos.")
    if not names:
        if remote.is_remote(root):
            raise ValueError(f"{root} holds no file; expected videos or tars of videos.")
        return {}, []
    archives: dict[str, list[str]] = {}
    for name in sorted(names, key=_order):
        found = _SPLIT.fullmatch(name)
        if found:
            archives.setdefault(found[1], []).append(name)
    return archives, [name for name in names if not _SPLIT.fullmatch(name)]


def _order(name: str) -> tuple[str, int, str]:
    """By which pieces of tars are sorted: 2 comes before 10."""
    found = _SPLIT.fullmatch(name)
    piece = (found[2] or found[3] or "") if found else ""
    return (found[1] if found else name), len(piece), piece


def _until_gap(places: list[str]) -> tuple[list[str], str]:
    """The pieces up to the first number that is missing, and what is missing."""
    numbers = [int(found[2]) for place in places if (found := _SPLIT.fullmatch(place)) and found[2]]
    if len(numbers) < len(places):
        return places, ""
    for index, number in enumerate(numbers):
        if number - index != numbers[0] or numbers[0] > 1:
            return places[:index], f"the piece before {os.path.basename(places[index])} is missing"
    return places, ""


def _members(archive: str, part: str, places: list[str]) -> Iterator[tuple[Any, ...]]:
    """Yields a row for every file in a tar, and one with a note where the tar is cut."""
    whole, wrong = _until_gap(places)
    count = 0
    if whole:
        with JoinedFile(whole) as file, tqdm(desc=f"index {part}", unit="file", delay=5) as bar:
            try:
                for name, start, size in _walk(file):
                    pieces = file.pieces(start, size)
                    text = "\n".join(f"{place}\t{first}\t{length}" for place, first, length in pieces)
                    yield f"{archive}\t{name}", f"{part}/{name}", os.path.basename(name), text, ""
                    count += 1
                    bar.update()
            except ValueError as error:
                wrong = wrong or str(error)
            except (tarfile.TarError, OSError) as error:
                wrong = wrong or f"it can't be read: {error}"
    if wrong:
        yield f"{archive}\t", "", "", "", f"{archive} is not whole, {wrong}; the {count} files before are used."


def _walk(file: JoinedFile) -> Iterator[tuple[str, int, int]]:
    """Yields name, first byte and size of the files in a tar.

    Raises:
      ValueError: it ends in the middle or is damaged, after the files before that place.
      tarfile.TarError, OSError: it can't be read.
    """
    with tarfile.open(fileobj=io.BufferedReader(file, 1 << 14), mode="r:") as tar:
        try:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
                if member.offset_data + member.size > file.size:
                    raise ValueError("it ends in the middle")
                if member.isfile():
                    yield os.path.normpath(member.name), member.offset_data, member.size
        except tarfile.ReadError as error:
            raise ValueError("it ends in the middle") from error
        end = tar.offset
        if file.size - end > _SLACK:
            raise ValueError(f"it is damaged at byte {end}")
        if not _ends(file):
            raise ValueError("it ends in the middle")


def _ends(file: JoinedFile) -> bool:
    """Whether a tar ends with a block of zeros."""
    file.seek(max(file.size - 512, 0))
    block = file.read(512)
    return bool(block) and not any(block)
