"""OpenS2V-5M's pairs: which reference of one clip shows the subject of which reference of another clip.

A file of pairs is a list of objects with `cur_id` and `aft_id`, each `<part>/<key of the record>`, `cur_class_id` and
`aft_class_id`, the numbers of the masks, and how alike names and images are. Published pairs are one file per cluster,
the clips of one film, in a tar. `cluster_videos.json` lists the clips of each cluster.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from refalign_jax.config import OpenS2VConfig
from refalign_jax.data.sources.index import build, query, state_of
from refalign_jax.data.sources.json_stream import read_entries
from refalign_jax.data.sources.videos import Videos, open_videos
from refalign_jax.data.stored import Stored, open_bytes

_LARGEST = 1 << 28
"""Bytes of a file of pairs that is held in memory."""


@dataclasses.dataclass(frozen=True)
class Pair:
    """A reference of a clip, and one of another clip that shows the same subject."""

    own_class: str
    """Number of the mask in the clip's record."""
    other: str
    """The other clip, `<part>/<key>`."""
    other_class: str
    """Number of the mask in the other clip's record."""


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Pairs and the records that they name; it can be pickled."""

    config: OpenS2VConfig
    files: Videos | None
    """Files of pairs by cluster; None for one file of all pairs."""
    clusters: Path | None
    """Table of the cluster of each clip; None to take it from the name."""
    records: Path
    """Table of the records by `<part>/<key>`."""
    jsons: tuple[str, ...]

    def of(self, id: str) -> list[Pair]:
        """Returns the pairs of a clip that are alike enough, in the order of their file.

        Raises:
          ValueError: the file of pairs is not in this form.
        """
        if self.files is None:
            return _by_clip(self.config, self.config.pairs).get(id, [])
        cluster = self._cluster(id)
        found = self.files.find(f"{cluster}.json") if cluster else None
        if found is None:
            return []
        content = found.read() if isinstance(found, Stored) else found.read_bytes()
        return _read(content, str(found), self.config).get(id, [])

    def _cluster(self, id: str) -> str:
        """The cluster of a clip; empty where it has none."""
        if self.clusters is not None:
            rows = query(self.clusters, "SELECT cluster FROM found WHERE id = ?", id)
            return rows[0][0] if rows else ""
        key = id.split("/", 1)[-1]
        name = key.split("_segment")[0]
        return key.split("_part")[0] if name == key else name

    def record(self, id: str) -> bytes | None:
        """Returns another clip's record, not parsed; None where no JSON file has it.

        Raises:
          ValueError: a JSON file can't be read.
        """
        rows = query(self.records, "SELECT file, start, length, value FROM found WHERE id = ?", id)
        if not rows:
            return None
        number, start, length, value = rows[0]
        if value is not None:
            return zlib.decompress(value)
        with open_bytes(self.jsons[number]) as file:
            file.seek(start)
            return file.read(length)


def open_pairs(config: OpenS2VConfig, jsons: Sequence[str], folder: Path) -> Pairs:
    """Makes the tables that pairs need.

    Args:
      config: where the pairs are.
      jsons: the data set's JSON files. What lies in a zip can't be found again, so the table keeps those records,
        compressed: all of them, or those of `config.clusters`.
      folder: where the tables are kept.

    Raises:
      ValueError: a file can't be read.
    """
    place = config.pairs
    files = None if place.endswith(".json") else open_videos(place, folder / "pairs")[0]
    clusters = None
    if config.clusters:
        clusters = folder / "clusters.sqlite"
        state = state_of([config.clusters])
        build(clusters, "id TEXT PRIMARY KEY, cluster TEXT", state, lambda: _clusters(config.clusters))

    def rows() -> Iterator[tuple[Any, ...]]:
        for number, name in enumerate(jsons):
            for entry in read_entries(name):
                id, value = f"{part_of(name)}/{entry.key}", None
                if name.endswith(".zip"):  # where it can't be found again
                    if clusters is not None and not query(clusters, "SELECT 1 FROM found WHERE id = ?", id):
                        continue
                    value = zlib.compress(entry.value, 1)
                yield id, number, entry.start, len(entry.value), value

    table = folder / "records.sqlite"
    columns = "id TEXT PRIMARY KEY, file INTEGER, start INTEGER, length INTEGER, value BLOB"
    build(table, columns, state_of(jsons), rows)
    return Pairs(config, files, clusters, table, tuple(jsons))


def part_of(json_file: str) -> str:
    """The part of the data set to which a JSON file belongs, by its name."""
    return os.path.basename(json_file).removesuffix(".zip").removesuffix(".json")


def _clusters(place: str) -> Iterator[tuple[str, str]]:
    """Yields the clips of a file of clusters, each with its cluster."""
    for entry in read_entries(place):
        members = json.loads(entry.value)
        if not isinstance(members, list) or not all(isinstance(member, str) for member in members):
            raise ValueError(f"{place}: the cluster {entry.key} is {members!r:.40}; it must be a list of ids.")
        for member in members:
            yield member, entry.key


@functools.lru_cache(maxsize=2)
def _by_clip(config: OpenS2VConfig, place: str) -> dict[str, list[Pair]]:
    """Reads one file of all pairs."""
    with open_bytes(place) as file:
        content = file.read(_LARGEST + 1)
    if len(content) > _LARGEST:
        raise ValueError(f"{place} is too large to be held; name the folder or tar with a file of pairs per cluster.")
    return _read(content, place, config)


def _read(content: bytes, place: str, config: OpenS2VConfig) -> dict[str, list[Pair]]:
    """Reads a file of pairs; returns those that are alike enough, by either clip."""
    try:
        found: dict[str, list[Pair]] = {}
        for row in json.loads(content):
            own, other = row["cur_id"], row["aft_id"]
            alike = row["text_similarity"] >= config.min_text_similarity
            if own != other and alike and row["image_similarity"] > config.min_image_similarity:
                first, second = str(row["cur_class_id"]), str(row["aft_class_id"])
                found.setdefault(own, []).append(Pair(first, other, second))
                found.setdefault(other, []).append(Pair(second, own, first))
        return found
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{place} is not a file of pairs: {type(error).__name__}: {error}.") from error
