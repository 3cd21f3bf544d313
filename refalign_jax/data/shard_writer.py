"""Writes prepared examples into the shards of a dataset.

A shard is written under a temporary name, closed, hashed, renamed, and only then entered into the manifest. A folder
has one writer at a time (locks.py). Records are not compressed: floating-point latents shrink by a fifth only, and
reading them would take twice as long.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping, Set
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from grain.sources import ArrayRecordDataSource

from refalign_jax import remote
from refalign_jax.atomic import atomic_write, first_line
from refalign_jax.config import Storage
from refalign_jax.data.examples import Example, cosines, encode, fill, parse
from refalign_jax.data.manifest import MANIFEST, Manifest, Shard, read_manifest, write_manifest
from refalign_jax.locks import exclusive

WRITER_OPTIONS = "group_size:1,uncompressed"
_NUMBER = re.compile(r"examples-(\d+)\.array_record")


class ShardWriter:
    """Writes examples into whole shards, and continues where an earlier writer of the folder stopped.

    Use it as a context manager. Leaving it normally finishes the last shard and marks the dataset as complete; leaving
    it by an exception discards the unfinished shard and keeps the finished ones.

    Args:
      folder: where to write; created if it does not exist.
      storage: dtype of each field.
      made: how the dataset is made, any JSON; "encoders" in it must be what it was when the dataset was begun.
      examples_per_shard: number of examples after which a shard is finished.

    Raises:
      ValueError: the folder has a dataset of another storage or other encoders, or another writer.
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
        made = json.loads(json.dumps(dict(made)))
        self.manifest = Manifest(complete=False, storage=storage, made=made)
        with contextlib.ExitStack() as stack:
            stack.enter_context(exclusive(self.folder, "a writer of examples"))
            if (self.folder / MANIFEST).exists():
                self._continue(read_manifest(folder))
            self._clean()
            self._lock = stack.pop_all()
        self._ids = set(self.done)

    def _clean(self) -> None:
        """Removes what an interrupted writer left: unfinished shards, and shards that the manifest does not list."""
        listed = {shard.name for shard in self.manifest.shards}
        try:
            leftovers = [*self.folder.glob("*.partial"), *self.folder.glob(".*.partial")]
            leftovers += [path for path in self.folder.glob("examples-*.array_record") if path.name not in listed]
            for leftover in leftovers:
                leftover.unlink(missing_ok=True)  # in an object store, * begins with a dot too: it is listed twice
        except OSError as error:
            raise OSError(f"{self.folder} can't be written: {remote.reason(error)}.") from error

    def _continue(self, found: Manifest) -> None:
        """Continues the dataset of an earlier writer."""
        if found.storage != self.manifest.storage:
            raise ValueError(f"{self.folder} holds examples stored as {found.storage}, not as {self.manifest.storage}.")
        theirs, ours = found.made.get("encoders"), self.manifest.made.get("encoders")
        if found.made.get("digests") and self.manifest.made.get("digests"):
            theirs, ours = (encoders_apart(made) for made in (found.made, self.manifest.made))
        if theirs != ours:
            raise ValueError(f"{self.folder} was made with the encoders {theirs}, not {ours}; name another folder.")
        self.manifest = dataclasses.replace(found, made=self.manifest.made)

    @property
    def done(self) -> frozenset[str]:
        """Ids of the examples in finished shards, which need not be prepared again."""
        return frozenset(id for shard in self.manifest.shards for id in shard.ids)

    def read(self, id: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Returns what `examples.parse` returns for a finished example.

        Raises:
          ValueError: its shard can't be read.
        """
        shard = next(shard for shard in self.manifest.shards if id in shard.ids)
        return parse(self._blobs(shard, [shard.ids.index(id)])[0])

    def _blobs(self, shard: Shard, rows: list[int]) -> list[bytes]:
        """Returns the records of a finished shard."""
        try:
            return list(ArrayRecordDataSource([os.fspath(self.folder / shard.name)]).__getitems__(rows))
        except (RuntimeError, ValueError, OSError) as error:
            raise ValueError(f"{self.folder / shard.name} can't be read: {first_line(error)}.") from error

    def remove(self, ids: Set[str]) -> None:
        """Takes finished examples out of the dataset, so that they can be added again.

        Each shard that holds one is replaced by a shard of its other examples, or by none, and the manifest is replaced
        in one step. The order of the examples that stay is kept.

        Raises:
          ValueError: a shard can't be read.
          OSError: a shard or the manifest can't be written; the dataset is as before.
        """
        assert self._open is None, "remove before adding"
        kept: list[Shard] = []
        for shard in self.manifest.shards:
            kept += self._without(shard, ids) if ids & set(shard.ids) else [shard]
        self.manifest = dataclasses.replace(self.manifest, shards=tuple(kept))
        self._finish_shard(complete=False)
        self._ids -= ids
        self._clean()

    def _without(self, shard: Shard, ids: Set[str]) -> list[Shard]:
        """Writes the examples of a shard without some of them into a new one, in a list; none if none is left."""
        rows = [row for row, id in enumerate(shard.ids) if id not in ids]
        if not rows:
            return []
        blobs, written = self._blobs(shard, rows), _OpenShard(self._next_path())
        for blob, row in zip(blobs, rows, strict=True):
            written.write(blob, shard, row)
        return [written.finish()]

    def _next_path(self) -> epath.Path:
        """A path that no shard has had: the highest number yet, and one."""
        names = [shard.name for shard in self.manifest.shards]
        names += [path.name for path in self.folder.glob("examples-*.array_record")]
        numbers = [int(number[1]) for number in map(_NUMBER.fullmatch, names) if number]
        return self.folder / f"examples-{max(numbers, default=-1) + 1:05d}.array_record"

    def add(self, example: Example, inputs: str = "") -> None:
        """Writes one example.

        Args:
          example: the example.
          inputs: digest of everything that it was made of, for the manifest.

        Raises:
          ValueError: its id is in the dataset already, its shapes are not the dataset's, or a value is not finite.
          OSError: the shard can't be written; finished shards are kept.
        """
        if example.id in self._ids:
            raise ValueError(f"Example {example.id} is in {self.folder} already; ids must be unique.")
        if self._ids and not self.manifest.subject_mask:  # begun by an older version, or without masks
            example = dataclasses.replace(example, subject_mask=None)
        elif self._ids and example.subject_mask is None:
            raise ValueError(f"Example {example.id} has no subject mask; the other examples of {self.folder} have one.")
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
        self.manifest = dataclasses.replace(
            self.manifest,
            video_latents=shape,
            text_width=text,
            vfm_width=vfm,
            subject_mask=example.subject_mask is not None,
        )
        if self._open is None:
            self._open = _OpenShard(self._next_path())
        self._open.write(blob, _entry(example, blob, inputs))
        self._ids.add(example.id)
        if len(self._open.entry.ids) == self._size:
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
        try:
            self._finish_shard(complete=True)
        finally:
            self._lock.close()
        return self.manifest

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if kind is None:
            self.close()
            return
        if self._open is not None:
            self._open.discard()
        self._lock.close()


def encoders_apart(made: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest says on its encoders; where it has digests of their weights, these instead of their paths."""
    digests = made.get("digests", {})
    apart = dict(made.get("encoders", {}))
    for name in digests.keys() & apart.keys():
        rest = {key: value for key, value in apart[name].items() if key not in ("path", "tokenizer")}
        apart[name] = rest | {"sha256": digests[name]}
    return apart


def _entry(example: Example, blob: bytes, inputs: str) -> Shard:
    """What the manifest says on one example, as a shard of it alone."""
    stored = np.empty(example.vfm_features.shape, np.float32)
    fill(stored, parse(blob)[0], "vfm_features")
    cosine = cosines(stored, example.vfm_features)
    return Shard(
        name="",
        bytes=0,
        sha256="",
        ids=[example.id],
        references=[len(example.subject_ids)],
        text_lengths=[len(example.text)],
        vfm_cosine=[float(cosine.mean()) if cosine.size else 1.0],
        inputs=[inputs],
    )


class _OpenShard:
    """A shard being written: a partial file in its folder, or in a temporary folder where that one is remote."""

    def __init__(self, path: epath.Path) -> None:
        self.path = path
        self._folder = tempfile.TemporaryDirectory() if remote.is_remote(path) else None
        beside = Path(self._folder.name) if self._folder else Path(path.parent)
        self._partial = beside / f"{path.name}.partial"
        self._writer = ArrayRecordWriter(os.fspath(self._partial), WRITER_OPTIONS)
        self._file = self._partial.open("rb")  # so that what is hashed is what this writer wrote
        self.entry = Shard(
            name=path.name, bytes=0, sha256="", ids=[], references=[], text_lengths=[], vfm_cosine=[], inputs=[]
        )

    def write(self, blob: bytes, entry: Shard, row: int = 0) -> None:
        """Writes a record; `entry` is a shard whose lists have the example at `row`."""
        try:
            self._writer.write(blob)
        except RuntimeError as error:
            raise self._failed(error) from error
        for name in ("ids", "references", "text_lengths", "vfm_cosine", "inputs"):
            values = getattr(entry, name)
            getattr(self.entry, name).append(values[row] if values else "")

    def finish(self) -> Shard:
        try:
            self._writer.close()
            sha256 = hashlib.file_digest(self._file, "sha256").hexdigest()
            size = os.fstat(self._file.fileno()).st_size
            if not size or not os.path.samestat(os.fstat(self._file.fileno()), self._partial.stat()):
                raise OSError("another process emptied or replaced it")
            with atomic_write(self.path) as temporary:
                if self._folder:
                    epath.Path(self._partial).copy(temporary)
                else:
                    self._partial.replace(temporary)
        except (OSError, RuntimeError) as error:
            raise self._failed(error) from error
        self._file.close()
        if self._folder:
            self._folder.cleanup()
        return dataclasses.replace(self.entry, bytes=size, sha256=sha256)

    def discard(self) -> None:
        with contextlib.suppress(RuntimeError):
            self._writer.close()
        self._file.close()
        with contextlib.suppress(OSError):
            self._partial.unlink(missing_ok=True)
        if self._folder:
            self._folder.cleanup()

    def _failed(self, error: Exception) -> OSError:
        self.discard()
        return OSError(f"{self.path} could not be written, finished shards are kept: {first_line(error)}.")
