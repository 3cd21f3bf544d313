"""Several prepared datasets as one source of examples: `data.mix`."""

from __future__ import annotations

import bisect
import itertools
import logging
import os
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from refalign_jax.config import FIELDS, DataConfig
from refalign_jax.data.examples import Spec
from refalign_jax.data.manifest import Manifest
from refalign_jax.data.shard_writer import encoders_apart
from refalign_jax.data.shards import ShardSource
from refalign_jax.digests import digest_json

logger = logging.getLogger(__name__)

_ENCODERS = {"video": "VAE", "text": "text encoder", "vfm": "VFM"}


class Source(Protocol):
    """Random access to examples: `ShardSource`, `synthetic.SyntheticSource`, `Mixture`."""

    spec: Spec
    """What the examples have in common."""

    def __len__(self) -> int:
        """Number of examples."""
        ...

    def __getitem__(self, index: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Returns what `examples.parse` returns.

        Raises:
          CorruptRecordError: the example can't be read.
        """
        ...

    def identity(self, count: int) -> str:
        """Returns a digest of the first `count` examples; another text where they are others."""
        ...


class Mixture:
    """Datasets one after another, numbered through. Implements `Source`; the loader reads them by their weights.

    Args:
      parts: the datasets, which must agree with each other.
    """

    def __init__(self, parts: Sequence[Source]) -> None:
        self.parts = tuple(parts)
        self.starts = list(itertools.accumulate((len(part) for part in parts), initial=0))
        specs = [part.spec for part in parts]
        self.spec = Spec(
            num_examples=self.starts[-1],
            video_latents=specs[0].video_latents,
            text_width=specs[0].text_width,
            vfm_width=specs[0].vfm_width,
            longest_text=max(spec.longest_text for spec in specs),
            most_references=max(spec.most_references for spec in specs),
            fewest_references=min(spec.fewest_references for spec in specs),
            storage=specs[0].storage,
            subject_mask=all(spec.subject_mask for spec in specs),
        )

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Returns what the dataset of the example returns."""
        number = bisect.bisect_right(self.starts, index) - 1
        return self.parts[number][index - self.starts[number]]

    def identity(self, count: int) -> str:
        """Returns a digest of all datasets, or an empty text for fewer examples than there are."""
        return digest_json([part.identity(len(part)) for part in self.parts]) if count == len(self) else ""


def parts_of(source: Source) -> tuple[Source, ...]:
    """Returns the datasets of a mixture; any other source is one dataset."""
    return source.parts if isinstance(source, Mixture) else (source,)


def manifest_of(source: Source) -> Manifest | None:
    """Returns the manifest of a dataset, or of a mixture's first, whose encoders all share; None without one."""
    first = parts_of(source)[0]
    return first.manifest if isinstance(first, ShardSource) else None


def open_dataset(data: DataConfig) -> ShardSource | Mixture:
    """Opens `data.path`, or the datasets of `data.mix`.

    Raises:
      ValueError: a dataset can't be opened, or the datasets don't fit each other: every difference is listed.
    """
    if not data.mix:
        return ShardSource(data.path)
    sources = [ShardSource(path) for path in data.paths]
    found = [
        f"{path} has {clause}"
        for path, source in zip(data.paths[1:], sources[1:], strict=True)
        for clause in _differences(sources[0].manifest, source.manifest, whole=data.dtype == "float32")
    ]
    if found:
        raise ValueError(f"The datasets of data.mix can't be mixed. Unlike {data.paths[0]}, {'; '.join(found)}.")
    rates = {path: _rate(source.manifest) for path, source in zip(data.paths, sources, strict=True)}
    if len(set(rates.values())) > 1:
        logger.info("The clips of the mixture have several rates: %s.", "; ".join(f"{p} {r}" for p, r in rates.items()))
    return Mixture(sources)


def _differences(first: Manifest, other: Manifest, whole: bool) -> list[str]:
    """Clauses on how one dataset differs from the first; `whole` says that a batch is float32 whatever is stored."""
    pairs: list[tuple[str, Any, Any]] = [
        ("video latents", list(other.video_latents), list(first.video_latents)),
        ("text width", other.text_width, first.text_width),
        ("VFM width", other.vfm_width, first.vfm_width),
    ]
    if not whole:
        stored = [{name: getattr(manifest.storage, name) for name in FIELDS} for manifest in (other, first)]
        pairs += [(f"dtype of {name} (data.dtype float32 mixes them)", *(s[name] for s in stored)) for name in FIELDS]
    found = [f"{what} {theirs}, not {ours}" for what, theirs, ours in pairs if theirs != ours]
    encoders = [encoders_apart(manifest.made) for manifest in (other, first)]
    for name, what in _ENCODERS.items():
        theirs, ours = (about.get(name) for about in encoders)
        if theirs == ours or theirs is None or ours is None:  # another program's datasets do not say theirs
            continue
        if theirs.get("name") != ours.get("name"):
            found.append(f"the {what} {theirs.get('name')}, not {ours.get('name')}")
        else:
            fields = sorted(key for key in theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key))
            pairs_ = ", ".join(f"{key} {_short(theirs.get(key))}, not {_short(ours.get(key))}" for key in fields)
            found.append(f"the {what} {theirs.get('name')} with {pairs_}")
    return found


def _short(value: Any) -> str:
    """A value in a sentence; a digest by its beginning."""
    return str(value) if len(str(value)) < 40 else f"{value!s:.12}…"


def _rate(manifest: Manifest) -> str:
    """How the frames of a dataset's clips were chosen."""
    settings = manifest.made.get("settings", {})
    fps, stride = settings.get("fps"), settings.get("stride", 1)
    return f"{fps:g} a second" if fps else f"every {stride}. of the video" if stride > 1 else "the video's"


def names_of(paths: Sequence[str | os.PathLike[str]]) -> list[str]:
    """Short names of datasets for metrics: the last part of each path, with the dataset's number where two agree."""
    last = [os.path.basename(os.fspath(path).rstrip("/")) for path in paths]
    return [name if last.count(name) == 1 else f"{name}_{number}" for number, name in enumerate(last, 1)]
