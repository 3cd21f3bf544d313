"""The manifest of a dataset on disk: which shards it has, what is in them, and how they were made.

    folder/manifest.json                 the manifest
    folder/examples-00000.array_record   shards of a few dozen examples each, one ArrayRecord record per example

A shard belongs to the dataset once the manifest lists it, and the manifest is replaced in one step; so a writer that is
killed leaves a dataset of whole shards. Folders are local, or any that etils' epath reads (`gs://`).
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from refalign_jax import remote
from refalign_jax.atomic import write_text
from refalign_jax.config import FIELDS, Storage
from refalign_jax.data.examples import MASK, Spec
from refalign_jax.digests import digest_json

MANIFEST = "manifest.json"
FORMAT = "refalign_jax examples 1"
_NAME = re.compile(r"(?!\.)[^/\0]+(/(?!\.)[^/\0]+)*")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """A finished shard; its lists have one entry per example."""

    name: str
    """File name, relative to the dataset's folder."""
    bytes: int
    """Size of the file."""
    sha256: str
    """Hash of the file, hexadecimal."""
    ids: list[str]
    references: list[int]
    """Number of references, R."""
    text_lengths: list[int]
    """Number of text tokens, S."""
    vfm_cosine: list[float]
    """Mean cosine of the stored VFM features to the exact ones; 1 without references."""
    inputs: list[str] = dataclasses.field(default_factory=list)
    """Digest of everything that an example was made of; empty where it is not known, as in older manifests."""

    def check(self) -> None:
        """Raises ValueError unless every field has its type and all lists have one entry per example."""
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise ValueError(f"a shard's name is {self.name!r:.60}; it must be that of a file in the folder")
        if not (_is_count(self.bytes) and isinstance(self.sha256, str) and re.fullmatch("[0-9a-f]{64}", self.sha256)):
            raise ValueError(f"{self.name} must have bytes, a whole number, and sha256, 64 hexadecimal digits")
        lists: dict[str, Callable[[Any], bool]] = {
            "ids": lambda value: isinstance(value, str),
            "references": _is_count,
            "text_lengths": _is_count,
            "vfm_cosine": lambda value: isinstance(value, (int, float)) and math.isfinite(value),
            "inputs": lambda value: isinstance(value, str),
        }
        for name, right in lists.items():
            values = getattr(self, name)
            if not isinstance(values, list) or not all(map(right, values)):
                raise ValueError(f"{self.name} has a wrong value in its list {name}")
            if len(values) != len(self.ids) and not (name == "inputs" and not values):
                raise ValueError(f"{self.name} has {len(self.ids)} ids, but {len(values)} values in its list {name}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a dataset contains, and how it was made."""

    complete: bool
    """False until the writer has finished."""
    storage: Storage
    """dtype of each field."""
    video_latents: tuple[int, int, int, int] = (0, 0, 0, 0)
    """F, H, W, C; zeros before the first example."""
    text_width: int = 0
    """Width of the text embeddings."""
    vfm_width: int = 0
    """E."""
    subject_mask: bool = False
    """Whether every example has a subject mask."""
    made: Mapping[str, Any]
    """How the dataset was made, as JSON: command, encoders, settings, versions, commit."""
    shards: tuple[Shard, ...] = ()
    """The shards in the order of their examples."""

    @property
    def num_examples(self) -> int:
        """Number of examples in all shards."""
        return sum(len(shard.ids) for shard in self.shards)

    @property
    def vfm_cosine(self) -> float:
        """Mean cosine of the stored VFM features to the exact ones, over all examples that have references."""
        pairs = [(c, r) for shard in self.shards for c, r in zip(shard.vfm_cosine, shard.references, strict=True) if r]
        return sum(c * r for c, r in pairs) / sum(r for _, r in pairs) if pairs else 1.0

    @property
    def spec(self) -> Spec:
        """What all examples have in common, as the loader needs it."""
        return Spec(
            num_examples=self.num_examples,
            video_latents=self.video_latents,
            text_width=self.text_width,
            vfm_width=self.vfm_width,
            longest_text=max((n for shard in self.shards for n in shard.text_lengths), default=0),
            most_references=max((n for shard in self.shards for n in shard.references), default=0),
            fewest_references=min((n for shard in self.shards for n in shard.references), default=0),
            storage=self.storage,
            subject_mask=self.subject_mask,
        )

    def to_json(self) -> str:
        """Returns the file's text; it spells out every field's shape and dtype for readers in other languages."""
        F, H, W, C = self.video_latents
        shapes = {
            "video_latents": [F, H, W, C],
            "reference_latents": ["R", H, W, C],
            "subject_ids": ["R"],
            "text": ["S", self.text_width],
            "vfm_features": ["R", self.spec.vfm_tokens, self.vfm_width],
        }
        if self.subject_mask:
            shapes[MASK] = ["R", self.spec.vfm_tokens]
        dtypes = {**dataclasses.asdict(self.storage), "subject_ids": "int32", MASK: "uint8"}
        head = {
            "format": FORMAT,
            "complete": self.complete,
            "num_examples": self.num_examples,
            "fields": {name: {"shape": shape, "dtype": dtypes[name]} for name, shape in shapes.items()},
            "vfm_cosine": self.vfm_cosine,
            "made": dict(self.made),
        }
        lines = [json.dumps(dataclasses.asdict(shard)) for shard in self.shards]
        body = json.dumps(head, indent=1)[:-2] + ',\n "shards": [\n  ' + ",\n  ".join(lines) + "\n ]"
        return f"{body}{_seal(body)}"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Reads what `to_json` wrote.

        Raises:
          ValueError, KeyError, TypeError: it is another text.
        """
        data = json.loads(text)
        if data["format"] != FORMAT:
            raise ValueError(f"its format is {data['format']!r:.60}, not {FORMAT!r}")
        unknown = data.keys() - {
            "format",
            "complete",
            "num_examples",
            "fields",
            "vfm_cosine",
            "made",
            "shards",
            "sha256",
        }
        if unknown:
            raise ValueError(f"it has the unknown field {min(unknown)!r:.60}")
        body = text.rpartition(',\n "sha256"')[0]
        if "sha256" in data and text != f"{body}{_seal(body)}":
            raise ValueError("it was changed after it was written: its sha256 is another")
        fields, made = data["fields"], data["made"]
        shapes = fields["video_latents"]["shape"], fields["text"]["shape"][1], fields["vfm_features"]["shape"][2]
        F, H, W, C = shapes[0]
        if not all(map(_is_count, (F, H, W, C, *shapes[1:]))):
            raise ValueError("a size among its fields is not a whole number")
        found = cls(
            complete=data["complete"],
            storage=Storage(**{name: fields[name]["dtype"] for name in FIELDS}),
            video_latents=(F, H, W, C),
            text_width=shapes[1],
            vfm_width=shapes[2],
            subject_mask=MASK in fields,
            made=made,
            shards=tuple(Shard(**shard) for shard in data["shards"]),
        )
        found.check()
        return found

    def check(self) -> None:
        """Raises ValueError unless every field has its type, shards are well-formed, and ids are unique."""
        if not isinstance(self.complete, bool):
            raise ValueError(f"complete is {self.complete!r:.60}; it must be true or false")
        objects = [self.made, *(self.made.get(name, {}) for name in ("settings", "encoders", "digests"))]
        if not all(isinstance(value, dict) for value in objects):
            raise ValueError("made, and settings, encoders and digests in it, must be objects")
        for shard in self.shards:
            shard.check()
        ids = collections.Counter(id for shard in self.shards for id in shard.ids)
        if ids and (most := ids.most_common(1)[0])[1] > 1:
            raise ValueError(f"the id {most[0]!r:.60} is in it twice")

    def identity(self, count: int) -> str:
        """Digest of the first `count` examples, by their shards' SHA-256; empty where a shard has examples beyond."""
        ends = list(itertools.accumulate((len(shard.ids) for shard in self.shards), initial=0))
        if count not in ends:
            return ""
        return digest_json([[shard.ids, shard.sha256] for shard in self.shards[: ends.index(count)]])


def _seal(body: str) -> str:
    """The end of a manifest's text: the digest of everything before it."""
    return f',\n "sha256": "{hashlib.sha256(body.encode()).hexdigest()}"\n}}\n'


def _is_count(value: Any) -> bool:
    """Whether a value is a whole number that is not negative."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def write_manifest(folder: str | os.PathLike[str], manifest: Manifest) -> None:
    """Writes or replaces a dataset's manifest.

    Raises:
      OSError: it can't be written; the one that was there stays.
    """
    write_text(epath.Path(folder) / MANIFEST, manifest.to_json())


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """Reads a dataset's manifest, finished or not.

    Raises:
      ValueError: no such folder, no manifest in it, or another kind of manifest.
      OSError: its store can't be reached, or refuses the credentials.
    """
    remote.check(folder)
    path = epath.Path(folder) / MANIFEST
    try:
        return Manifest.from_json(path.read_text())
    except OSError as error:
        raise ValueError(
            f"{path} can't be read ({remote.reason(error)}); a dataset is a folder that tools/prepare.py wrote."
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise ValueError(f"{path} is not a manifest of prepared examples: {error!s:.200}.") from error
