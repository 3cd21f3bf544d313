"""Records to prepared examples: decode, crop, cut out references, encode, once; training reads the result alone.

Reading runs ahead in threads, the encoders run here. Everything random about a record comes from its id and the seed,
so the same records give the same examples in any order and after any interruption. A run that is started again passes
over the records that lie in finished shards and tries again those that were left out. Each record left out is told in
skipped.jsonl.

Several processes may share the work: part i of n takes each n-th record into a dataset of its own in a folder beside
the others, and whichever part is ready last writes the manifest that makes them one dataset.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
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

from refalign_jax.config import AugmentConfig, PrepareConfig
from refalign_jax.data.clips import choose_frames, resize_and_crop
from refalign_jax.data.examples import Example
from refalign_jax.data.records import Record, Reference, Skipped, subject_ids
from refalign_jax.data.references import prepare_reference
from refalign_jax.data.shards import MANIFEST, Manifest, ShardWriter, read_manifest
from refalign_jax.data.video import cut_out, probe, read_frames, read_image, read_mask, to_float
from refalign_jax.encoders.open import Encoders, open_encoders
from refalign_jax.provenance import about

SKIPPED = "skipped.jsonl"
UNREADABLE_VIDEO = "the video can't be read"
UNREADABLE_REFERENCE = "a reference can't be read"
NOT_FINITE = "the encoders gave NaN or infinity"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Clip:
    """A record's pixels, ready to be encoded."""

    record: Record
    video: UInt8[np.ndarray, "T h w 3"]
    references: UInt8[np.ndarray, "R h w 3"]
    subject_ids: np.ndarray
    """int32 [R]."""
    metadata: Mapping[str, Any]


def load(record: Record, config: PrepareConfig) -> Clip | Skipped:
    """Reads a record's pixels: the clip at its size, and the references on white."""
    digest = hashlib.sha256(record.id.encode()).digest()
    rng = np.random.default_rng([config.seed, *np.frombuffer(digest, np.uint32).tolist()])
    try:
        info = probe(record.video)
        first, end = record.frames or (0, info.num_frames)
        available = min(end, info.num_frames) - first
        chosen = choose_frames(available, config.num_frames, config.stride, rng)
        if chosen is None:
            detail = f"{record.video} has {max(available, 0)} frames of the clip; {config.num_frames} are needed."
            return Skipped(id=record.id, reason=f"fewer than {config.num_frames} frames", detail=detail)
        video = read_frames(record.video, chosen + first, record.crop)
    except ValueError as error:
        return Skipped(id=record.id, reason=UNREADABLE_VIDEO, detail=str(error))
    used = record.references[: config.max_references]
    try:
        references = [
            load_reference(reference, config.height, config.width, augment=config.augment, rng=rng)
            for reference in used
        ]
    except ValueError as error:
        return Skipped(id=record.id, reason=UNREADABLE_REFERENCE, detail=str(error))
    size = (config.height, config.width)
    return Clip(
        record=record,
        video=resize_and_crop(video, *size),
        references=np.stack(references) if references else np.empty((0, *size, 3), np.uint8),
        subject_ids=subject_ids(used),
        metadata={
            **record.metadata,
            "fps": info.fps / config.stride,
            "frames": (chosen + first).tolist(),
            "subjects": [reference.subject for reference in used],
        },
    )


def load_reference(
    reference: Reference,
    height: int,
    width: int,
    *,
    augment: AugmentConfig | None = None,
    rng: np.random.Generator | None = None,
) -> UInt8[np.ndarray, "h w 3"]:
    """Reads one reference and puts it on white, altered where it was cut from the clip itself.

    Raises:
      ValueError: it can't be read, or mask or box don't fit it.
    """
    path, frame, mask = reference.path, reference.frame, reference.mask
    image = read_image(path) if frame is None else read_frames(path, [frame])[0]
    image = cut_out(image, reference.crop, str(path))
    return prepare_reference(
        image,
        height,
        width,
        mask=mask if mask is None or isinstance(mask, np.ndarray) else read_mask(mask),
        box=reference.box,
        augment=augment if reference.own_clip else None,
        rng=rng,
        what=str(path),
    )


def encode(clips: Sequence[Clip], encoders: Encoders) -> list[Example]:
    """Encodes clips together; `ValueError` where the encoders' outputs don't fit each other."""
    counts = [len(clip.references) for clip in clips]
    ends = np.cumsum(counts)[:-1]
    videos = encoders.video.encode(np.stack([to_float(clip.video) for clip in clips]))
    texts = encoders.text.encode([clip.record.prompt for clip in clips])
    images = np.concatenate([to_float(clip.references) for clip in clips])
    _, _, H, W, C = videos.shape
    if len(images):
        latents = encoders.video.encode(images[:, None])[:, 0]
        features = encoders.vfm.encode(images)
    else:
        latents = np.empty((0, H, W, C), np.float32)
        features = np.empty((0, H // 2, W // 2, encoders.vfm.width), np.float32)
    features = features.reshape(len(images), H // 2 * (W // 2), encoders.vfm.width)
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


def prepare(
    records: Sequence[Record | Skipped],
    folder: str | os.PathLike[str],
    config: PrepareConfig,
    source: Mapping[str, Any],
) -> str:
    """Prepares records into a dataset, going on where an earlier run stopped.

    Args:
      records: of a source; `Skipped` where the source left a clip out.
      folder: the dataset's, local or `gs://`.
      config: how.
      source: what the manifest says of the source.

    Returns:
      A sentence with the counts.

    Raises:
      ValueError: the folder was begun with other settings, encoders don't fit, or no record became an example.
      OSError: the folder can't be written; finished shards are kept.
    """
    index, parts = config.part
    whole = epath.Path(folder)
    place = whole / f"part-{index:05d}-of-{parts:05d}" if parts > 1 else whole
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
            (place / SKIPPED).write_text("".join(f"{line}\n" for line in lines))
    joined = _join(whole, parts) if parts > 1 else ""
    return f"{len(done) + left} examples are in {place}, {left} of them new; {_counts(skipped)}.{joined}"


def _examples(
    todo: Sequence[Record | Skipped], config: PrepareConfig, encoders: Encoders, skipped: list[Skipped], bar: tqdm
) -> Iterator[Example]:
    """Yields the examples of records in their order; those left out go to `skipped`."""

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
            waiting.append(pool.submit(lambda r: r if isinstance(r, Skipped) else load(r, config), record))
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _check_settings(folder: epath.Path, config: PrepareConfig) -> None:
    """Raises ValueError where the folder holds a dataset of other settings."""
    if not (folder / MANIFEST).exists():
        return
    found = read_manifest(folder).made.get("settings", {})
    for name, value in config.settings.items():
        if found.get(name) != value:
            raise ValueError(
                f"{folder} was begun with {name}={found.get(name)}, not {value}; give the same, or name another folder."
            )


def _counts(skipped: Sequence[Skipped]) -> str:
    """How many were left out for which reason, the most frequent first."""
    if not skipped:
        return "none was left out"
    reasons = collections.Counter(entry.reason for entry in skipped).most_common()
    return f"{len(skipped)} left out ({', '.join(f'{count} {reason}' for reason, count in reasons)}; see {SKIPPED})"


def _nothing_left(skipped: Sequence[Skipped], folder: epath.Path) -> str:
    """The sentence that no record became an example."""
    first = f" The first: {skipped[0].detail}" if skipped and skipped[0].detail else ""
    return f"No record became an example in {folder}: {_counts(skipped)}.{first}"


def _join(folder: epath.Path, parts: int) -> str:
    """Writes the manifest that makes finished parts one dataset; says what is missing otherwise.

    Raises:
      ValueError: the parts were made differently, or hold no example together.
      OSError: the manifest can't be written.
    """
    names = [f"part-{index:05d}-of-{parts:05d}" for index in range(1, parts + 1)]
    begun = [name for name in names if (folder / name / MANIFEST).exists()]
    manifests = {name: read_manifest(folder / name) for name in begun}
    missing = [name for name in names if name not in manifests or not manifests[name].complete]
    if missing:
        return f" {len(missing)} of {parts} parts are missing: {', '.join(missing[:4])}."
    filled = {name: manifest for name, manifest in manifests.items() if manifest.num_examples}
    if not filled:
        raise ValueError(f"No record became an example in {folder}; see {SKIPPED} in its {parts} parts.")

    def kind(manifest: Manifest) -> Any:
        settings = {**manifest.made["settings"], "part": None}
        shape = (manifest.video_latents, manifest.text_width, manifest.vfm_width, manifest.storage)
        return shape, settings, manifest.made["encoders"]

    first_name, first = next(iter(filled.items()))
    for name, manifest in filled.items():
        if kind(manifest) != kind(first):
            raise ValueError(f"{folder / name} and {first_name} were made with different settings; prepare one again.")
    shards = [
        dataclasses.replace(shard, name=f"{name}/{shard.name}")
        for name, manifest in filled.items()
        for shard in manifest.shards
    ]
    whole = dataclasses.replace(first, shards=tuple(shards))
    partial = folder / f"{MANIFEST}.{os.getpid()}.partial"
    partial.write_text(whole.to_json())
    partial.replace(folder / MANIFEST)
    return f" All {parts} parts are ready: {whole.num_examples} examples in {folder}."
