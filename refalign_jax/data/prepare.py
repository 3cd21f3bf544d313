"""Records to prepared examples: read, encode, write, once; training reads the result alone.

Records are read ahead in threads; the encoders run in this one. Everything random about a record depends on its id and
the seed, so the same records give the same examples in any order and after any interruption. A run that is started
again skips the records that are in finished shards, and tries again those that were left out. Every record left out is
listed in skipped.jsonl with its reason.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib.metadata
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import UInt8
from tqdm import tqdm

from refalign_jax.atomic import write_text
from refalign_jax.config import PrepareConfig
from refalign_jax.data.clips import Clip, load_clip
from refalign_jax.data.examples import Example
from refalign_jax.data.manifest import MANIFEST, read_manifest
from refalign_jax.data.parts import join_parts, part_name
from refalign_jax.data.records import Record, Skipped
from refalign_jax.data.references import encode_references
from refalign_jax.data.shard_writer import ShardWriter
from refalign_jax.data.video import to_float
from refalign_jax.encoders.interface import FeatureEncoder
from refalign_jax.encoders.open import Encoders, open_encoders
from refalign_jax.provenance import about
from refalign_jax.types import Float

SKIPPED = "skipped.jsonl"
NOT_FINITE = "the encoders gave NaN or infinity"


def prepare(
    records: Sequence[Record | Skipped],
    folder: str | os.PathLike[str],
    config: PrepareConfig,
    source: Mapping[str, Any],
) -> str:
    """Prepares records into a dataset, and continues where an earlier run stopped.

    Args:
      records: what a source yields.
      folder: the dataset's folder, local or `gs://`.
      config: encoders, sizes and settings.
      source: JSON on the source, for the manifest.

    Returns:
      A sentence with the counts.

    Raises:
      ValueError: the folder was begun with other settings, the encoders don't fit, or no record became an example.
      OSError: the folder can't be written; finished shards are kept.
    """
    index, parts = config.part
    whole = epath.Path(folder)
    place = whole / part_name(index, parts) if parts > 1 else whole
    _check_settings(place, config)
    encoders = open_encoders(config)
    (empty,) = encoders.text.encode([""])
    made = about()
    made["versions"] |= {name: importlib.metadata.version(name) for name in ("av", "pillow", "scikit-image")}
    made |= {"source": dict(source), "settings": config.settings, "encoders": encoders.describe()}
    made["empty_text"] = [[float(f"{value:.9g}") for value in row] for row in empty.tolist()]
    skipped: list[Skipped] = []
    with ShardWriter(place, storage=config.storage, made=made, examples_per_shard=config.examples_per_shard) as writer:
        done = writer.done
        mine = records[index - 1 :: parts]
        todo = [record for record in mine if record.id not in done]
        try:
            with tqdm(total=len(mine), initial=len(mine) - len(todo), unit="record", desc="prepare") as bar:
                for example in _examples(todo, config, encoders, skipped, bar):
                    writer.add(example)
            left = len(todo) - len(skipped)
            if not left and not done and parts == 1:
                raise ValueError(_nothing_left(skipped, place))
        finally:
            lines = [json.dumps(dataclasses.asdict(entry), ensure_ascii=False) for entry in skipped]
            write_text(place / SKIPPED, "".join(f"{line}\n" for line in lines))
    joined = f" {join_parts(whole, parts)}" if parts > 1 else ""
    return f"{len(done) + left} examples are in {place}, {left} of them new; {_counts(skipped)}.{joined}"


def encode(clips: Sequence[Clip], encoders: Encoders) -> list[Example]:
    """Encodes clips of one size together.

    Raises:
      ValueError: the encoders' outputs don't fit each other.
    """
    videos = encoders.video.encode(np.stack([to_float(clip.video) for clip in clips]))
    texts = encoders.text.encode([clip.record.prompt for clip in clips])
    images = np.concatenate([clip.references for clip in clips])
    latents = encode_references(images, encoders.video)
    features = _features(images, encoders.vfm)
    ends = np.cumsum([len(clip.references) for clip in clips])[:-1]
    parts = zip(clips, videos, texts, np.split(latents, ends), np.split(features, ends), strict=True)
    return [
        Example(
            id=clip.record.id,
            prompt=clip.record.prompt,
            video_latents=video,
            reference_latents=reference_latents,
            subject_ids=clip.subject_ids,
            text=text,
            vfm_features=vfm_features,
            metadata=clip.metadata,
        )
        for clip, video, text, reference_latents, vfm_features in parts
    ]


def _features(images: UInt8[np.ndarray, "R h w 3"], vfm: FeatureEncoder) -> Float[np.ndarray, "R P E"]:
    """Computes the VFM's features of references, P patches in row-major order; R may be 0."""
    R, h, w, _ = images.shape
    P = h // vfm.patch_size * (w // vfm.patch_size)
    return vfm.encode(to_float(images)).reshape(R, P, vfm.width) if R else np.empty((0, P, vfm.width), np.float32)


def _examples(
    todo: Sequence[Record | Skipped], config: PrepareConfig, encoders: Encoders, skipped: list[Skipped], bar: tqdm
) -> Iterator[Example]:
    """Yields the examples of records, in order; records that are left out are appended to `skipped`."""

    def encoded(clips: list[Clip]) -> Iterator[Example]:
        for example in encode(clips, encoders):
            values = (example.video_latents, example.reference_latents, example.text, example.vfm_features)
            if all(np.isfinite(array).all() for array in values):
                yield example
            else:
                skipped.append(Skipped(id=example.id, reason=NOT_FINITE))
            bar.update()

    clips: list[Clip] = []
    for loaded in _read_ahead(todo, config):
        if isinstance(loaded, Skipped):
            skipped.append(loaded)
            bar.update()
        else:
            clips.append(loaded)
        bar.set_postfix(skipped=len(skipped), refresh=False)
        if len(clips) == config.batch_size:
            yield from encoded(clips)
            clips = []
    if clips:
        yield from encoded(clips)


def _read_ahead(todo: Sequence[Record | Skipped], config: PrepareConfig) -> Iterator[Clip | Skipped]:
    """Reads records in threads, a few ahead, and yields them in order."""
    pool = ThreadPoolExecutor(config.workers)
    waiting: collections.deque[Future[Clip | Skipped]] = collections.deque()
    try:
        for record in todo:
            if len(waiting) >= config.workers + 1:
                yield waiting.popleft().result()
            waiting.append(pool.submit(lambda r: r if isinstance(r, Skipped) else load_clip(r, config), record))
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _check_settings(folder: epath.Path, config: PrepareConfig) -> None:
    """Raises ValueError if the folder has a dataset that was begun with other settings."""
    if not (folder / MANIFEST).exists():
        return
    found = {"fps": 0.0} | read_manifest(folder).made.get("settings", {})  # older datasets have no `fps`
    for name, value in config.settings.items():
        if found.get(name) != value:
            raise ValueError(
                f"{folder} was begun with {name}={found.get(name)}, not {value}; give the same, or name another folder."
            )


def _counts(skipped: Sequence[Skipped]) -> str:
    """Says how many records were left out for which reason, the most frequent first."""
    if not skipped:
        return "none was left out"
    reasons = collections.Counter(entry.reason for entry in skipped).most_common()
    return f"{len(skipped)} left out ({', '.join(f'{count} {reason}' for reason, count in reasons)}; see {SKIPPED})"


def _nothing_left(skipped: Sequence[Skipped], folder: epath.Path) -> str:
    """Returns the sentence that no record became an example."""
    first = f" The first: {skipped[0].detail}" if skipped and skipped[0].detail else ""
    return f"No record became an example in {folder}: {_counts(skipped)}.{first}"
