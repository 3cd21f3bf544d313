"""A dataset on disk: ArrayRecord shards of prepared examples and one manifest.

    folder/manifest.json                 what the shards hold and how they were made
    folder/examples-00000.array_record   a few dozen examples each, one record an example

The manifest is the truth. A shard is written under a temporary name, closed, synced, hashed, renamed, and only then
entered into the manifest, which itself is replaced in one step. So a writer that is killed leaves a dataset of whole
shards, and the next writer goes on after them. Records are not compressed: floating-point latents shrink by a fifth
and reading them takes twice as long.

Folders are local or anything that etils' epath reads (`gs://`); ArrayRecord reads both by itself.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from grain.sources import ArrayRecordDataSource

from refalign_jax.config import FIELDS, Storage
from refalign_jax.data.examples import Example, Spec, cosines, encode, fill, parse

MANIFEST = "manifest.json"
FORMAT = "refalign_jax examples 1"
WRITER_OPTIONS = "group_size:1,uncompressed"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """One finished shard, as the manifest lists it; the lists have an entry an example."""

    name: str
    bytes: int
    sha256: str
    ids: list[str]
    references: list[int]
    text_lengths: list[int]
    vfm_cosine: list[float]
    """Mean cosine of the example's stored VFM targets to the given ones; 1 without references."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a dataset holds and how it was made."""

    complete: bool
    """False while a writer has more to add."""
    storage: Storage
    video_latents: tuple[int, int, int, int] = (0, 0, 0, 0)
    """F, H, W, C; zeros before the first example."""
    text_width: int = 0
    vfm_width: int = 0
    made: Mapping[str, Any]
    """The writer's word on how: command, encoders, versions, commit."""
    shards: tuple[Shard, ...] = ()

    @property
    def num_examples(self) -> int:
        """Examples of all shards."""
        return sum(len(shard.ids) for shard in self.shards)

    @property
    def vfm_cosine(self) -> float:
        """Mean cosine of the stored VFM targets to the given ones, over all examples that have references."""
        pairs = [(c, r) for shard in self.shards for c, r in zip(shard.vfm_cosine, shard.references, strict=True) if r]
        return sum(c * r for c, r in pairs) / sum(r for _, r in pairs) if pairs else 1.0

    @property
    def spec(self) -> Spec:
        """The same in the form the loader asks for."""
        return Spec(
            num_examples=self.num_examples,
            video_latents=self.video_latents,
            text_width=self.text_width,
            vfm_width=self.vfm_width,
            longest_text=max((n for shard in self.shards for n in shard.text_lengths), default=0),
            most_references=max((n for shard in self.shards for n in shard.references), default=0),
        )

    def to_json(self) -> str:
        """The file's text; fields' shapes are spelt out for readers of other languages."""
        F, H, W, C = self.video_latents
        shapes = {
            "video_latents": [F, H, W, C],
            "reference_latents": ["R", H, W, C],
            "subject_ids": ["R"],
            "text": ["S", self.text_width],
            "vfm_features": ["R", self.spec.vfm_tokens, self.vfm_width],
        }
        dtypes = {**dataclasses.asdict(self.storage), "subject_ids": "int32"}
        head = {
            "format": FORMAT,
            "complete": self.complete,
            "num_examples": self.num_examples,
            "fields": {name: {"shape": shape, "dtype": dtypes[name]} for name, shape in shapes.items()},
            "vfm_cosine": self.vfm_cosine,
            "made": dict(self.made),
        }
        lines = [json.dumps(dataclasses.asdict(shard)) for shard in self.shards]
        return json.dumps(head, indent=1)[:-2] + ',\n "shards": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Reads what `to_json` wrote.

        Raises:
          ValueError, KeyError, TypeError: not such a text.
        """
        data = json.loads(text)
        if data["format"] != FORMAT:
            raise ValueError(f"its format is {data['format']!r}, not {FORMAT!r}")
        fields = data["fields"]
        F, H, W, C = fields["video_latents"]["shape"]
        return cls(
            complete=data["complete"],
            storage=Storage(**{name: fields[name]["dtype"] for name in FIELDS}),
            video_latents=(F, H, W, C),
            text_width=fields["text"]["shape"][1],
            vfm_width=fields["vfm_features"]["shape"][2],
            made=data["made"],
            shards=tuple(Shard(**shard) for shard in data["shards"]),
        )


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """Reads a dataset's manifest, finished or not.

    Raises:
      ValueError: no such folder, no manifest in it, or one that is not ours.
    """
    path = epath.Path(folder) / MANIFEST
    try:
        return Manifest.from_json(path.read_text())
    except OSError as error:
        raise ValueError(
            f"{path} can't be read ({error.strerror or error}); a dataset is a folder that tools/prepare.py wrote."
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a manifest of prepared examples: {error!s:.200}.") from error


class ShardWriter:
    """Writes examples into shards, whole shards or none; goes on where an earlier writer of the folder stopped.

    Use it as a context manager: leaving normally finishes the last shard and marks the dataset complete, leaving by an
    exception drops the examples of the unfinished shard and keeps the finished ones.

    Args:
      folder: where to write; made if it does not exist. One writer a folder at a time.
      storage: dtype of each field.
      made: how the dataset is made, any JSON; what stands under its key "encoders" must be the same when going on.
      name: shards are called `name-00000.array_record`, counted from 0.
      examples_per_shard: a shard is finished when it holds so many.

    Raises:
      ValueError: the folder holds a dataset of another storage or other encoders.
      OSError: the folder can't be written.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        storage: Storage,
        made: Mapping[str, Any],
        name: str = "examples",
        examples_per_shard: int = 64,
    ) -> None:
        if examples_per_shard < 1:
            raise ValueError(f"examples_per_shard is {examples_per_shard}; it must be at least 1.")
        self.folder = epath.Path(folder)
        self._name, self._size = name, examples_per_shard
        self._open: _OpenShard | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            begun = (self.folder / MANIFEST).exists()
            for leftover in self.folder.glob("*.partial"):
                leftover.unlink()
        except OSError as error:
            raise OSError(f"{self.folder} can't be written: {error.strerror or error}.") from error
        made = json.loads(json.dumps(dict(made)))
        self.manifest = Manifest(complete=False, storage=storage, made=made)
        if begun:
            self._go_on(read_manifest(folder))
        self._ids = {id for shard in self.manifest.shards for id in shard.ids}

    def _go_on(self, found: Manifest) -> None:
        """Takes over the shards of an earlier writer."""
        if found.storage != self.manifest.storage:
            raise ValueError(f"{self.folder} holds examples stored as {found.storage}, not as {self.manifest.storage}.")
        theirs, ours = found.made.get("encoders"), self.manifest.made.get("encoders")
        if theirs != ours:
            raise ValueError(f"{self.folder} was made with the encoders {theirs}, not {ours}; name another folder.")
        self.manifest = dataclasses.replace(found, made=self.manifest.made)

    @property
    def done(self) -> frozenset[str]:
        """Ids of the examples in finished shards: those that need no second preparing."""
        return frozenset(id for shard in self.manifest.shards for id in shard.ids)

    def add(self, example: Example) -> None:
        """Writes one example.

        Raises:
          ValueError: its id is there already, its shapes are not those of the dataset, or a value is not finite.
          OSError: the shard can't be written; finished shards are kept.
        """
        if example.id in self._ids:
            raise ValueError(f"Example {example.id} is in {self.folder} already; ids must be unique.")
        F, H, W, C = example.video_latents.shape
        given = ((F, H, W, C), example.text.shape[1], example.vfm_features.shape[2])
        expected = (self.manifest.video_latents, self.manifest.text_width, self.manifest.vfm_width)
        if self._ids and given != expected:
            raise ValueError(
                f"Example {example.id} has video latents, text width, VFM width {given}; "
                f"those of {self.folder} are {expected}, and all examples of a dataset must agree."
            )
        blob = encode(example, self.manifest.storage)
        shape, text, vfm = given
        self.manifest = dataclasses.replace(self.manifest, video_latents=shape, text_width=text, vfm_width=vfm)
        if self._open is None:
            number = len(self.manifest.shards)
            self._open = _OpenShard(self.folder / f"{self._name}-{number:05d}.array_record")
        self._open.write(blob, example)
        self._ids.add(example.id)
        if len(self._open.ids) == self._size:
            self._finish_shard(complete=False)

    def _finish_shard(self, complete: bool) -> None:
        """Closes the open shard, if there is one, and enters it into the manifest."""
        shards = self.manifest.shards
        if self._open is not None:
            shards = (*shards, self._open.finish())
            self._open = None
        self.manifest = dataclasses.replace(self.manifest, shards=shards, complete=complete)
        path = self.folder / MANIFEST
        partial = path.with_name(f"{path.name}.partial")
        try:
            partial.write_text(self.manifest.to_json())
            partial.replace(path)
        except OSError as error:
            raise OSError(f"{path} could not be written: {error.strerror or error}.") from error

    def close(self) -> Manifest:
        """Finishes the last shard and marks the dataset complete.

        Raises:
          OSError: the shard or the manifest can't be written.
        """
        self._finish_shard(complete=True)
        return self.manifest

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if kind is None:
            self.close()
        elif self._open is not None:
            self._open.discard()


class _OpenShard:
    """A shard being written: a partial file beside its place, or a temporary one when the place is remote."""

    def __init__(self, path: epath.Path) -> None:
        self.path = path
        self._folder = tempfile.TemporaryDirectory() if "://" in os.fspath(path) else None
        beside = Path(self._folder.name) if self._folder else Path(path.parent)
        self._partial = beside / f"{path.name}.partial"
        self._writer = ArrayRecordWriter(os.fspath(self._partial), WRITER_OPTIONS)
        self.ids: list[str] = []
        self._references: list[int] = []
        self._text_lengths: list[int] = []
        self._cosines: list[float] = []

    def write(self, blob: bytes, example: Example) -> None:
        stored = np.empty(example.vfm_features.shape, np.float32)
        fill(stored, parse(blob)[0], "vfm_features")
        cosine = cosines(stored, example.vfm_features)
        try:
            self._writer.write(blob)
        except RuntimeError as error:
            raise self._failed(error) from error
        self.ids.append(example.id)
        self._references.append(len(example.subject_ids))
        self._text_lengths.append(len(example.text))
        self._cosines.append(float(cosine.mean()) if cosine.size else 1.0)

    def finish(self) -> Shard:
        try:
            self._writer.close()
            with self._partial.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
                os.fsync(file.fileno())
            size = self._partial.stat().st_size
            if self._folder:
                epath.Path(self._partial).copy(self.path, overwrite=True)
                self._folder.cleanup()
            else:
                self._partial.replace(self.path)
        except (OSError, RuntimeError) as error:
            raise self._failed(error) from error
        return Shard(
            name=self.path.name,
            bytes=size,
            sha256=sha256,
            ids=self.ids,
            references=self._references,
            text_lengths=self._text_lengths,
            vfm_cosine=self._cosines,
        )

    def discard(self) -> None:
        with contextlib.suppress(RuntimeError):
            self._writer.close()
        self._partial.unlink(missing_ok=True)
        if self._folder:
            self._folder.cleanup()

    def _failed(self, error: Exception) -> OSError:
        self.discard()
        return OSError(f"{self.path} could not be written, finished shards are kept: {_first_line(error)}.")


class CorruptRecordError(ValueError):
    """One record can't be read; the message names its shard and its place."""


class ShardSource:
    """Random access to the examples of a finished dataset, in the order they were written.

    Opening reads the manifest and compares the shards' sizes with it; checksums are `verify`'s work.

    Args:
      folder: the dataset.

    Raises:
      ValueError: no dataset, an unfinished or empty one, or a shard that is missing or of another size.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = epath.Path(folder)
        self.manifest = read_manifest(folder)
        shards = self.manifest.shards
        if not self.manifest.complete:
            raise ValueError(
                f"{self.folder} is unfinished with {self.manifest.num_examples} examples in {len(shards)} shards; "
                "run the command that prepares it again, it goes on where it stopped."
            )
        if not shards:
            raise ValueError(f"{self.folder} holds no examples; prepare at least one.")
        for shard in shards:
            _check_size(self.folder / shard.name, shard)
        self.spec = self.manifest.spec
        self._ends = list(itertools.accumulate(len(shard.ids) for shard in shards))
        # The record counts in brackets spare ArrayRecordDataSource opening every shard at the start.
        self._records = ArrayRecordDataSource([f"{self.folder / s.name}[0:{len(s.ids)}]" for s in shards])

    def __len__(self) -> int:
        return self._ends[-1]

    def where(self, index: int) -> tuple[str, int]:
        """Returns the shard's name and the record's place in it, of an example in [0, len)."""
        shard = bisect.bisect_right(self._ends, index)
        return self.manifest.shards[shard].name, index - (self._ends[shard - 1] if shard else 0)

    def __getitem__(self, index: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Returns what `example.parse` returns, read-only views of the record's bytes.

        Raises:
          CorruptRecordError: ArrayRecord's checksum, the safetensors header or the shapes are wrong.
        """
        try:
            arrays, about = parse(self._records[index])
            shapes = (arrays["video_latents"].shape, arrays["text"].shape[1], arrays["vfm_features"].shape[2])
            if shapes != (self.spec.video_latents, self.spec.text_width, self.spec.vfm_width):
                raise ValueError(f"its shapes {shapes} are not the manifest's")
        except (RuntimeError, ValueError, OSError) as error:
            name, place = self.where(index)
            raise CorruptRecordError(
                f"{self.folder / name}, record {place} (example {index}) can't be read: {_first_line(error)}."
            ) from error
        return arrays, about


def verify(folder: str | os.PathLike[str]) -> list[str]:
    """Reads every shard and compares size and SHA-256 with the manifest.

    Returns:
      One sentence for each shard that is not as it was written.

    Raises:
      ValueError: no manifest.
    """
    problems = []
    for shard in read_manifest(folder).shards:
        path = epath.Path(folder) / shard.name
        try:
            _check_size(path, shard)
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != shard.sha256:
                raise ValueError(f"{path} has SHA-256 {digest[:12]}…, the manifest says {shard.sha256[:12]}….")
        except (ValueError, OSError) as error:
            problems.append(f"{_first_line(error)}.")
    return problems


def _check_size(path: epath.Path, shard: Shard) -> None:
    """Raises ValueError where a shard is missing or of another size than when it was written."""
    try:
        size = path.stat().length
    except OSError as error:
        raise ValueError(f"{path} is missing; the manifest lists it with {len(shard.ids)} examples.") from error
    if size != shard.bytes:
        raise ValueError(f"{path} has {size} bytes, the manifest says {shard.bytes}; it is truncated or was changed.")


def _first_line(error: Exception) -> str:
    """The error's first line, without the full stop."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
