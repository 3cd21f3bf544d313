"""Random access to the examples of a dataset on disk."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import os
from typing import Any

import numpy as np
from etils import epath
from grain.sources import ArrayRecordDataSource

from refalign_jax import remote
from refalign_jax.atomic import first_line
from refalign_jax.data.examples import MASK, parse
from refalign_jax.data.manifest import Shard, read_manifest

WAN_FPS = 16.0
"""Frames a second at which Wan2.1 was trained and writes its videos."""


_UNANSWERED = ("Permanent error", "Retry policy", "Error in non-idempotent operation")
"""Parts of the messages of Google's client in ArrayRecord that say nothing about the data."""


class CorruptRecordError(ValueError):
    """A record can't be read; the message names its shard and its number in it."""


class ShardSource:
    """Random access to the examples of a finished dataset, in the order in which they were written.

    Opening it reads the manifest and compares the sizes of the shards; `verify_shards` compares their checksums too.

    Args:
      folder: the dataset's folder.

    Raises:
      ValueError: no dataset, an unfinished or empty one, or a shard that is missing or has another size.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = epath.Path(folder)
        self.manifest = read_manifest(folder)
        shards = self.manifest.shards
        if not self.manifest.complete:
            raise ValueError(
                f"{self.folder} is unfinished with {self.manifest.num_examples} examples in {len(shards)} shards; "
                "run the command that prepares it again; it continues where it stopped."
            )
        if not shards:
            raise ValueError(f"{self.folder} holds no examples; prepare at least one.")
        for shard in shards:
            _check_size(self.folder / shard.name, shard)
        self.spec = self.manifest.spec
        self._ends = list(itertools.accumulate(len(shard.ids) for shard in shards))
        # With the number of records in brackets, ArrayRecordDataSource need not open every shard at the start.
        self._records = ArrayRecordDataSource([f"{self.folder / s.name}[0:{len(s.ids)}]" for s in shards])

    def __len__(self) -> int:
        return self._ends[-1]

    def where(self, index: int) -> tuple[str, int]:
        """Returns the name of the shard of example `index`, in [0, len), and the number of its record in it."""
        shard, place = self._find(index)
        return shard.name, place

    def _find(self, index: int) -> tuple[Shard, int]:
        """Returns the shard of an example, and the number of its record in it."""
        number = bisect.bisect_right(self._ends, index)
        return self.manifest.shards[number], index - (self._ends[number - 1] if number else 0)

    def identity(self, count: int) -> str:
        """Returns a digest of the first `count` examples, as `Manifest.identity` does."""
        return self.manifest.identity(count)

    def __getitem__(self, index: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Returns what `examples.parse` returns for the record, read-only views of its bytes.

        Raises:
          CorruptRecordError: ArrayRecord's checksum, the safetensors header or the shapes are wrong.
          OSError: the object store does not answer, or refuses; the record may be whole.
        """
        shard, place = self._find(index)
        name, ids = shard.name, shard.ids
        try:
            arrays, about = parse(self._records[index])
            shapes = (arrays["video_latents"].shape, arrays["text"].shape[1], arrays["vfm_features"].shape[2])
            if shapes != (self.spec.video_latents, self.spec.text_width, self.spec.vfm_width):
                raise ValueError(f"its shapes {shapes} are not the manifest's")
            if self.spec.subject_mask and MASK not in arrays:
                raise ValueError("it has no subject mask, the manifest says that it has")
            if about["id"] != ids[place]:
                raise ValueError(f"its id is {about['id']!r:.60}, the manifest has {ids[place]!r:.60} there")
            if (count := len(arrays["subject_ids"])) != shard.references[place]:
                raise ValueError(f"it has {count} references, the manifest says {shard.references[place]}")
        except (RuntimeError, ValueError, OSError) as error:
            text = f"{self.folder / name}, record {place} (example {index}) can't be read: {first_line(error)}."
            answered = not remote.is_remote(self.folder) or not any(part in str(error) for part in _UNANSWERED)
            raise (CorruptRecordError(text) if answered else OSError(text)) from error
        return arrays, about


def clip_fps(folder: str | os.PathLike[str]) -> float:
    """Returns the frames a second of a dataset's clips.

    They are those it was prepared with or, where it kept the videos' own rates, the median of the first examples'; 16,
    Wan2.1's, where the videos did not say theirs.

    Raises:
      ValueError: no manifest, or examples that can't be read.
    """
    if fps := read_manifest(folder).made.get("settings", {}).get("fps"):
        return float(fps)
    source = ShardSource(folder)
    rates = [source[index][1]["metadata"].get("fps") for index in range(min(len(source), 8))]
    known = [rate for rate in rates if isinstance(rate, int | float) and rate > 0]
    return float(np.median(known)) if known else WAN_FPS


def verify_shards(folder: str | os.PathLike[str]) -> list[str]:
    """Reads every shard and compares size and SHA-256 with the manifest.

    Returns:
      One sentence for each shard that is not as it was written; an empty list where all are.

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
            problems.append(f"{first_line(error)}.")
    return problems


def _check_size(path: epath.Path, shard: Shard) -> None:
    """Raises ValueError if a shard is missing or has another size than when it was written."""
    try:
        size = path.stat().length
    except OSError as error:
        raise ValueError(f"{path} is missing; the manifest lists it with {len(shard.ids)} examples.") from error
    if size != shard.bytes:
        raise ValueError(f"{path} has {size} bytes, the manifest says {shard.bytes}; it is truncated or was changed.")
