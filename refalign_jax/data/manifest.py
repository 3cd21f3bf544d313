"""The manifest of a dataset on disk: which shards it has, what is in them, and how they were made.

    folder/manifest.json                 the manifest
    folder/examples-00000.array_record   shards of a few dozen examples each, one ArrayRecord record per example

A shard belongs to the dataset once the manifest lists it, and the manifest is replaced in one step; so a writer that is
killed leaves a dataset of whole shards. Folders are local, or any that etils' epath reads (`gs://`).
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

from etils import epath

from refalign_jax.atomic import write_text
from refalign_jax.config import FIELDS, Storage
from refalign_jax.data.examples import Spec

MANIFEST = "manifest.json"
FORMAT = "refalign_jax examples 1"


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
            storage=self.storage,
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
          ValueError, KeyError, TypeError: it is another text.
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
