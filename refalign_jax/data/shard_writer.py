"""Writes prepared examples into the shards of a dataset.

A shard is written under a temporary name, closed, hashed, renamed, and only then entered into the manifest. Records are
not compressed: floating-point latents shrink by a fifth only, and reading them would take twice as long.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
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

from refalign_jax.atomic import atomic_write, first_line
from refalign_jax.config import Storage
from refalign_jax.data.examples import Example, cosines, encode, fill, parse
from refalign_jax.data.manifest import MANIFEST, Manifest, Shard, read_manifest, write_manifest

WRITER_OPTIONS = "group_size:1,uncompressed"


class ShardWriter:
    """Writes examples into whole shards, and continues where an earlier writer of the folder stopped.

    Use it as a context manager. Leaving it normally finishes the last shard and marks the dataset as complete; leaving
    it by an exception discards the unfinished shard and keeps the finished ones.

    Args:
      folder: where to write; created if it does not exist. It must have one writer at a time.
      storage: dtype of each field.
      made: how the dataset is made, any JSON; "encoders" in it must be what it was when the dataset was begun.
      examples_per_shard: number of examples after which a shard is finished.

    Raises:
      ValueError: the folder has a dataset of another storage or other encoders.
      OSError: the folder can't be written.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        storage: Storage,
        made: Mapping[str, Any],
        examples_per_shard: int = 64,
    ) -> None:
        if examples_per_shard < 1:
            raise ValueError(f"examples_per_shard is {examples_per_shard}; it must be at least 1.")
        self.folder = epath.Path(folder)
        self._size = examples_per_shard
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
            self._continue(read_manifest(folder))
        self._ids = {id for shard in self.manifest.shards for id in shard.ids}

    def _continue(self, found: Manifest) -> None:
        """Continues the dataset of an earlier writer."""
        if found.storage != self.manifest.storage:
            raise ValueError(f"{self.folder} holds examples stored as {found.storage}, not as {self.manifest.storage}.")
        theirs, ours = found.made.get("encoders"), self.manifest.made.get("encoders")
        if theirs != ours:
            raise ValueError(f"{self.folder} was made with the encoders {theirs}, not {ours}; name another folder.")
        self.manifest = dataclasses.replace(found, made=self.manifest.made)

    @property
    def done(self) -> frozenset[str]:
        """Ids of the examples in finished shards, which need not be prepared again."""
        return frozenset(id for shard in self.manifest.shards for id in shard.ids)

    def add(self, example: Example) -> None:
        """Writes one example.

        Raises:
          ValueError: its id is in the dataset already, its shapes are not the dataset's, or a value is not finite.
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
            self._open = _OpenShard(self.folder / f"examples-{number:05d}.array_record")
        self._open.write(blob, example)
        self._ids.add(example.id)
        if len(self._open.ids) == self._size:
            self._finish_shard(complete=False)

    def _finish_shard(self, complete: bool) -> None:
        """Finishes the open shard, if there is one, and writes the manifest."""
        shards = self.manifest.shards
        if self._open is not None:
            shards = (*shards, self._open.finish())
            self._open = None
        self.manifest = dataclasses.replace(self.manifest, shards=shards, complete=complete)
        write_manifest(self.folder, self.manifest)

    def close(self) -> Manifest:
        """Finishes the last shard and marks the dataset as complete.

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
    """A shard being written: a partial file in its folder, or in a temporary folder where that one is remote."""

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
            size = self._partial.stat().st_size
            with atomic_write(self.path) as temporary:
                if self._folder:
                    epath.Path(self._partial).copy(temporary)
                else:
                    self._partial.replace(temporary)
        except (OSError, RuntimeError) as error:
            raise self._failed(error) from error
        if self._folder:
            self._folder.cleanup()
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
        return OSError(f"{self.path} could not be written, finished shards are kept: {first_line(error)}.")
