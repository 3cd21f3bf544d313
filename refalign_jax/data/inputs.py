"""What a prepared example was made of: digests of its files and of everything else in its record.

The digest of all of it stands in the manifest, that of each file in the example's metadata. Where a file is does not
matter: what was moved or renamed is the same.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from tqdm import tqdm

from refalign_jax import remote
from refalign_jax.data.manifest import Manifest
from refalign_jax.data.records import Entry, Record, RunLengths, Skipped
from refalign_jax.data.stored import File, Stored
from refalign_jax.data.threads import in_order
from refalign_jax.digests import Digests, digest_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """The inputs of one example."""

    files: Mapping[str, str]
    """Digest of each file by its role: `video`, `references[0]`, `references[0].mask` and so on."""
    rest: Any
    """Prompt, frames, regions and names, as JSON."""

    @property
    def digest(self) -> str:
        """Digest of all inputs, 32 hexadecimal digits."""
        return digest_json([dict(self.files), self.rest])[:32]


def files_of(record: Record, max_references: int) -> dict[str, File]:
    """The files of a record by their role, as in `Inputs.files`."""
    files: dict[str, File] = {"video": record.video}
    for number, reference in enumerate(record.references[:max_references]):
        files[f"references[{number}]"] = reference.path
        if reference.mask is not None and not isinstance(reference.mask, np.ndarray | RunLengths):
            files[f"references[{number}].mask"] = reference.mask
    return files


def read_inputs(record: Record, max_references: int, digests: Digests) -> Inputs:
    """Digests a record.

    Args:
      record: the record.
      max_references: how many of its references are used, the first ones.
      digests: of the folder of results.

    Raises:
      ValueError: a file does not exist or is no regular file.
      OSError: a file can't be read.
    """
    files = {role: _digest(file, digests) for role, file in files_of(record, max_references).items()}
    references = [
        {
            name: _as_json(value)
            for name, value in vars(reference).items()
            if name not in ("path", "why")
            and not isinstance(value, os.PathLike | Stored)
            and not (name == "box_size" and value is None)
        }
        for reference in record.references[:max_references]
    ]
    return Inputs(files=files, rest=[record.prompt, record.crop, record.frames, references])


def _digest(file: File, digests: Digests) -> str:
    """Digests a file, wherever it is."""
    if not isinstance(file, Stored):
        return digests.file(file)
    places = [place for place, _, _ in file.pieces]
    if any(map(remote.is_remote, places)):
        return hashlib.sha256(file.read()).hexdigest()
    return digests.part(repr(file.pieces), places, file.read)


def _as_json(value: Any) -> Any:
    """A field of a reference as JSON; what is long becomes its digest."""
    if isinstance(value, np.ndarray):
        return digest_array(value)
    return [*value.size, value.counts] if isinstance(value, RunLengths) else value


def digest_array(values: np.ndarray) -> str:
    """SHA-256 of an array, hexadecimal."""
    return hashlib.sha256(repr((values.shape, values.dtype.str)).encode() + values.tobytes()).hexdigest()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """How the finished examples of a dataset compare with the records of a run that goes on with it."""

    changed: frozenset[str]
    """Ids of examples whose inputs are others now."""
    gone: int
    """Number of examples of which a file is gone, so that they are kept as they are."""
    unknown: int
    """Number of examples that have no digest, because an older version made them; they are kept."""
    others: int
    """Number of examples of records that this run does not have; they are kept."""
    remote: int
    """Number of examples whose files are at URLs, which are not read again to compare them; they are kept."""

    def __str__(self) -> str:
        """Clauses on what is kept without being known to be up to date; empty where there is none."""
        clauses = (
            (self.gone, "whose files are gone"),
            (self.unknown, "without digests, as older versions made them"),
            (self.others, "of other records"),
            (self.remote, "whose files are at URLs"),
        )
        found = [f"{count} {words}" for count, words in clauses if count]
        return f" Kept unchecked: {', '.join(found)}." if found else ""


def compare(
    manifest: Manifest,
    records: Iterable[Record | Skipped | Entry],
    max_references: int,
    digests: Digests,
    workers: int,
) -> Comparison:
    """Compares the finished examples of a dataset with the records as they are now.

    Args:
      manifest: of the dataset.
      records: of this run.
      max_references: how many references of a record are used.
      digests: of the dataset's folder.
      workers: threads that read files.
    """
    before = {
        id: digest
        for shard in manifest.shards
        for id, digest in zip(shard.ids, shard.inputs or [""] * len(shard.ids), strict=True)
    }
    others, changed, counts = set(before), set(), collections.Counter[str]()

    def known() -> Iterator[Record | Entry]:
        for record in records if before else ():
            others.discard(record.id)
            if before.get(record.id) and not isinstance(record, Skipped):
                yield record

    def look(record: Record | Entry) -> tuple[str, str]:
        try:
            found = record if isinstance(record, Record) else record.read()
            if isinstance(found, Skipped):
                return record.id, "gone"
            files = files_of(found, max_references).values()
            if any(
                isinstance(file, Stored) and any(remote.is_remote(place) for place, _, _ in file.pieces)
                for file in files
            ):
                return record.id, "remote"
            digest = read_inputs(found, max_references, digests).digest
        except (ValueError, OSError):
            return record.id, "gone"
        return record.id, "" if digest == before[record.id] else "changed"

    bar = tqdm(total=len(before), desc="compare inputs", unit="record", delay=5)
    for id, state in in_order(look, known(), workers, 4 * workers):
        bar.update()
        counts[state] += 1
        if state == "changed":
            changed.add(id)
    bar.close()
    return Comparison(
        changed=frozenset(changed),
        gone=counts["gone"],
        unknown=sum(not digest for digest in before.values()),
        others=len(others),
        remote=counts["remote"],
    )


def changed_files(record: Record, before: Mapping[str, str], max_references: int, digests: Digests) -> list[str]:
    """Names what changed of a record's inputs: paths, or its text.

    Args:
      record: the record.
      before: the example's `Inputs.files`.
      max_references: how many references are used.
      digests: of the dataset's folder.
    """
    now, paths = read_inputs(record, max_references, digests).files, files_of(record, max_references)
    roles = sorted(role for role in now.keys() | before.keys() if now.get(role) != before.get(role))
    return [str(paths.get(role, role)) for role in roles] or ["its record"]
