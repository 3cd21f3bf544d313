"""Records to prepared examples: read, encode, write, once; training reads the result alone.

Records are read ahead in threads; the encoders run in this one. Everything random about a record depends on its id and
the seed, so the same records give the same examples in any order and after any interruption. A run that is started
again skips the records that are in finished shards, and tries again those that were left out. Every record left out is
listed in skipped.jsonl with its reason.

An example belongs to the contents of its files (inputs.py). Where these have changed since, the run stops before it
writes anything and names them: a dataset that a training run has read should not change unasked. With `redo`, such
examples are taken out of their shards and made again at the dataset's end.
"""

from __future__ import annotations

import collections
import contextlib
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

from refalign_jax.atomic import first_line, write_text
from refalign_jax.config import MAX_TEXT_LENGTH, PrepareConfig
from refalign_jax.data.clips import Clip, load_clip
from refalign_jax.data.examples import Example
from refalign_jax.data.inputs import Inputs, changed_files, compare, read_inputs
from refalign_jax.data.manifest import MANIFEST, read_manifest
from refalign_jax.data.parts import join_parts, part_name
from refalign_jax.data.records import Record, Skipped
from refalign_jax.data.references import encode_references
from refalign_jax.data.shard_writer import ShardWriter
from refalign_jax.data.video import to_float
from refalign_jax.digests import Digests
from refalign_jax.encoders.interface import FeatureEncoder
from refalign_jax.encoders.open import Encoders, open_encoders, weights_digests
from refalign_jax.locks import check_free
from refalign_jax.provenance import about
from refalign_jax.types import Bool, Float

SKIPPED = "skipped.jsonl"
NOT_FINITE = "the encoders gave NaN or infinity"
UNREADABLE_RECORD = "the record can't be read"
SHOWN_FROM = 0.1
"""Share of a patch that its subject covers at least; a patch with less is blank."""
INPUTS = "inputs"
"""Where an example's metadata has the digests of its files."""


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
      ValueError: the folder is in use, was begun with other settings or holds examples whose inputs have changed, the
        encoders don't fit, two records have one id, or no record became an example.
      OSError: the folder can't be written; finished shards are kept.
    """
    index, parts = config.part
    whole = epath.Path(folder)
    place = whole / part_name(index, parts) if parts > 1 else whole
    mine = records[index - 1 :: parts]
    _check_ids(mine)
    check_free(place, "tools/prepare.py")
    _check_settings(place, config)
    encoders = open_encoders(config)
    with contextlib.ExitStack() as stack:
        digests = stack.enter_context(Digests(place))
        made = _describe(config, source, encoders, digests)
        size = config.examples_per_shard
        writer = stack.enter_context(ShardWriter(place, storage=config.storage, made=made, examples_per_shard=size))
        _check_settings(place, config)  # another process may have begun it since
        run = _Run(config=config, encoders=encoders, digests=digests)
        kept = _drop_changed(mine, writer, run)
        before = len(writer.done)
        todo = [record for record in mine if record.id not in writer.done]
        try:
            with tqdm(total=len(mine), initial=len(mine) - len(todo), unit="record", desc="prepare") as bar:
                for example in _examples(todo, run, bar):
                    writer.add(example, run.inputs[example.id].digest)
            new = len(todo) - len(run.skipped)
            if not new and not before and parts == 1:
                raise ValueError(_nothing_left(run.skipped, place))
        finally:
            lines = [json.dumps(dataclasses.asdict(entry), ensure_ascii=False) for entry in run.skipped]
            write_text(place / SKIPPED, "".join(f"{line}\n" for line in lines))
    notes = f"{_counts(run.skipped)}.{kept}{run.cut_prompts()}"
    joined = f" {join_parts(whole, parts)}" if parts > 1 else ""
    return f"{before + new} examples are in {place}, {new} of them new; {notes}{joined}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Run:
    """What a run of `prepare` works with, and what it notes on the way."""

    config: PrepareConfig
    encoders: Encoders
    digests: Digests
    skipped: list[Skipped] = dataclasses.field(default_factory=list)
    """Records that were left out."""
    inputs: dict[str, Inputs] = dataclasses.field(default_factory=dict)
    """What each example is made of, by its id."""
    cut: dict[str, int] = dataclasses.field(default_factory=dict)
    """Tokens that a prompt lost, by the example's id."""

    def cut_prompts(self) -> str:
        """Returns a sentence on the prompts that were cut; empty where there is none."""
        if not self.cut:
            return ""
        most = max(self.cut, key=lambda id: self.cut[id])
        return (
            f" Cut at {MAX_TEXT_LENGTH} tokens: {len(self.cut)} prompts, the longest, of {most}, by {self.cut[most]}."
        )


def _describe(config: PrepareConfig, source: Mapping[str, Any], encoders: Encoders, digests: Digests) -> dict[str, Any]:
    """Returns `Manifest.made`."""
    (empty,) = encoders.text.encode([""])
    made = about()
    made["versions"] |= {name: importlib.metadata.version(name) for name in ("av", "pillow", "scikit-image")}
    made |= {"source": dict(source), "settings": config.settings, "encoders": encoders.describe()}
    made["digests"] = weights_digests(made["encoders"], digests)
    made["empty_text"] = [[float(f"{value:.9g}") for value in row] for row in empty.tolist()]
    return made


def _check_ids(records: Sequence[Record | Skipped]) -> None:
    """Raises ValueError if two records have one id."""
    ids = collections.Counter(record.id for record in records)
    repeated = [id for id, count in ids.items() if count > 1]
    if repeated:
        raise ValueError(
            f"{len(repeated)} ids are those of several records, such as {repeated[0]!r}; make them unique."
        )


def _drop_changed(records: Sequence[Record | Skipped], writer: ShardWriter, run: _Run) -> str:
    """Takes out the examples whose inputs have changed, if that is wanted.

    Returns:
      Sentences on what was taken out and what is kept unchecked; empty where there is nothing to say.

    Raises:
      ValueError: inputs have changed, but `redo` is not set.
    """
    config, readable = run.config, {record.id: record for record in records if isinstance(record, Record)}
    found = compare(writer.manifest, list(readable.values()), config.max_references, run.digests, config.workers)
    if not found.changed:
        return str(found)
    if not config.redo:
        first = min(found.changed)
        metadata = writer.read(first)[1]["metadata"]
        files = changed_files(readable[first], metadata.get(INPUTS, {}), config.max_references, run.digests)
        raise ValueError(
            f"{writer.folder} holds {len(found.changed)} examples whose inputs have changed since, such as {first} "
            f"({', '.join(files)}); start with --redo to make them again, or name another folder."
        )
    writer.remove(found.changed)
    return f" Made again, because inputs had changed: {len(found.changed)}.{found}"


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
    masks = subject_patches(np.concatenate([clip.subjects for clip in clips]), encoders.vfm.patch_size)
    ends = np.cumsum([len(clip.references) for clip in clips])[:-1]
    parts = zip(clips, videos, texts, *(np.split(x, ends) for x in (latents, features, masks)), strict=True)
    return [
        Example(
            id=clip.record.id,
            prompt=clip.record.prompt,
            video_latents=video,
            reference_latents=reference_latents,
            subject_ids=clip.subject_ids,
            text=text,
            vfm_features=vfm_features,
            subject_mask=subject_mask,
            metadata=clip.metadata,
        )
        for clip, video, text, reference_latents, vfm_features, subject_mask in parts
    ]


def subject_patches(subjects: Bool[np.ndarray, "R h w"], patch_size: int) -> Bool[np.ndarray, "R P"]:
    """Which patches show the subject: those of which it covers at least `SHOWN_FROM`; the others are blank."""
    R, h, w = subjects.shape
    rows, columns = h // patch_size, w // patch_size
    shares = subjects.reshape(R, rows, patch_size, columns, patch_size).mean((2, 4))
    return (shares >= SHOWN_FROM).reshape(R, rows * columns)


def _features(images: UInt8[np.ndarray, "R h w 3"], vfm: FeatureEncoder) -> Float[np.ndarray, "R P E"]:
    """Computes the VFM's features of references, P patches in row-major order; R may be 0."""
    R, h, w, _ = images.shape
    P = h // vfm.patch_size * (w // vfm.patch_size)
    return vfm.encode(to_float(images)).reshape(R, P, vfm.width) if R else np.empty((0, P, vfm.width), np.float32)


def _examples(todo: Sequence[Record | Skipped], run: _Run, bar: tqdm) -> Iterator[Example]:
    """Yields the examples of records, in order; records that are left out are appended to `run.skipped`."""
    skipped = run.skipped

    def encoded(clips: list[Clip]) -> Iterator[Example]:
        counts = run.encoders.text.count_tokens([clip.record.prompt for clip in clips])
        for example, tokens in zip(encode(clips, run.encoders), counts, strict=True):
            if tokens > MAX_TEXT_LENGTH:
                run.cut[example.id] = tokens - MAX_TEXT_LENGTH
            values = (example.video_latents, example.reference_latents, example.text, example.vfm_features)
            if all(np.isfinite(array).all() for array in values):
                yield example
            else:
                skipped.append(Skipped(id=example.id, reason=NOT_FINITE))
            bar.update()

    clips: list[Clip] = []
    for loaded in _read_ahead(todo, run):
        if isinstance(loaded, Skipped):
            skipped.append(loaded)
            bar.update()
        else:
            clips.append(loaded)
        bar.set_postfix(skipped=len(skipped), refresh=False)
        if len(clips) == run.config.batch_size:
            yield from encoded(clips)
            clips = []
    if clips:
        yield from encoded(clips)


def _read_ahead(todo: Sequence[Record | Skipped], run: _Run) -> Iterator[Clip | Skipped]:
    """Reads records in threads, a few ahead, and yields them in order."""
    workers = run.config.workers
    pool = ThreadPoolExecutor(workers)
    waiting: collections.deque[Future[Clip | Skipped]] = collections.deque()
    try:
        for record in todo:
            if len(waiting) >= workers + 1:
                yield waiting.popleft().result()
            waiting.append(pool.submit(_load, record, run))
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _load(record: Record | Skipped, run: _Run) -> Clip | Skipped:
    """Reads one record and digests its files; whatever goes wrong leaves out this record alone."""
    if isinstance(record, Skipped):
        return record
    try:
        clip = load_clip(record, run.config)
        if isinstance(clip, Clip):
            inputs = run.inputs[record.id] = read_inputs(record, run.config.max_references, run.digests)
            clip = dataclasses.replace(clip, metadata={**clip.metadata, INPUTS: dict(inputs.files)})
    except Exception as error:  # a fault in one file must not end a run of days
        return Skipped(id=record.id, reason=UNREADABLE_RECORD, detail=f"{type(error).__name__}: {first_line(error)}.")
    return clip


def _check_settings(folder: epath.Path, config: PrepareConfig) -> None:
    """Raises ValueError if the folder has a dataset that was begun with other settings."""
    if not (folder / MANIFEST).exists():
        return
    found = read_manifest(folder).made.get("settings", {})
    older = {"fps": 0.0}  # fields that settings did not have at first, and what held then
    for name, value in config.settings.items():
        before = found.get(name, older.get(name))
        if before != value:
            raise ValueError(
                f"{folder} was begun with {name}={before}, not {value}; give the same, or name another folder."
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
