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
import hashlib
import importlib.metadata
import itertools
import json
import operator
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath
from tqdm import tqdm

from refalign_jax.config import MAX_TEXT_LENGTH, AugmentConfig, PrepareConfig
from refalign_jax.data.clips import INPUTS, Clip, load_record
from refalign_jax.data.encode import encode_clips
from refalign_jax.data.examples import Example
from refalign_jax.data.inputs import changed_files, compare
from refalign_jax.data.manifest import MANIFEST, read_manifest
from refalign_jax.data.parts import join_parts, part_name
from refalign_jax.data.records import Entry, Record, Records, Skipped
from refalign_jax.data.shard_writer import ShardWriter
from refalign_jax.data.skips import SkipLog
from refalign_jax.data.threads import in_order
from refalign_jax.digests import Digests
from refalign_jax.encoders.open import Encoders, open_encoders, weights_digests
from refalign_jax.locks import check_free
from refalign_jax.provenance import about

REPEATED = "another record has its id"
_OLDER = {"fps": 0.0}
"""Settings that manifests did not have at first, and what held then."""


def prepare(
    records: Records,
    folder: str | os.PathLike[str],
    config: PrepareConfig,
    source: Mapping[str, Any],
) -> str:
    """Prepares records into a dataset, and continues where an earlier run stopped.

    Args:
      records: what a source yields. Records are taken one after the other and not kept; where the folder has finished
        examples, they are iterated over twice.
      folder: the dataset's folder, local or `gs://`.
      config: encoders, sizes and settings.
      source: JSON on the source, for the manifest; `settings` in it decide what becomes of a record.

    Returns:
      A sentence with the counts.

    Raises:
      ValueError: the folder is in use, was begun with other settings or holds examples whose inputs have changed, the
        encoders don't fit, two records of a list have one id, or no record became an example.
      OSError: the folder can't be written; finished shards are kept.
    """
    index, parts = config.part
    whole = epath.Path(folder)
    place = whole / part_name(index, parts) if parts > 1 else whole
    mine = _Part(records, index, parts)
    if isinstance(records, Sequence):
        _check_ids(mine)
    check_free(place, "tools/prepare.py")
    _check_settings(place, config, source)
    encoders = open_encoders(config)
    with contextlib.ExitStack() as stack:
        digests = stack.enter_context(Digests(place))
        made = _describe(config, source, encoders, digests)
        size = config.examples_per_shard
        writer = stack.enter_context(ShardWriter(place, storage=config.storage, made=made, examples_per_shard=size))
        _check_settings(place, config, source)  # another process may have begun it since
        run = _Run(config=config, encoders=encoders, digests=digests, skips=stack.enter_context(SkipLog(place)))
        kept = _drop_changed(mine, writer, run)
        done, new = writer.done, 0
        with tqdm(total=operator.length_hint(mine) or None, unit="record", desc="prepare") as bar:
            for example, inputs in _examples(_todo(mine, done, bar), run, bar):
                writer.add(example, inputs)
                new += 1
            bar.total = bar.n  # it may have been an estimate
        if not new and not done and parts == 1:
            first = f" The first: {run.skips.first.detail}" if run.skips.first and run.skips.first.detail else ""
            raise ValueError(f"No record became an example in {place}: {run.skips}.{first}")
    notes = f"{run.skips}.{kept}{run.cut_prompts()}{run.lost_references()}"
    joined = f" {join_parts(whole, parts)}" if parts > 1 else ""
    return f"{len(done) + new} examples are in {place}, {new} of them new; {notes}{joined}"


@dataclasses.dataclass(frozen=True)
class _Part:
    """Every n-th record of a source."""

    records: Records
    index: int
    parts: int

    def __iter__(self) -> Iterator[Record | Skipped | Entry]:
        return itertools.islice(iter(self.records), self.index - 1, None, self.parts)

    def __length_hint__(self) -> int:
        return max(operator.length_hint(self.records) - self.index + self.parts, 0) // self.parts


@dataclasses.dataclass(kw_only=True)
class _Run:
    """What a run of `prepare` works with, and what it notes on the way."""

    config: PrepareConfig
    encoders: Encoders
    digests: Digests
    skips: SkipLog
    """Records that were left out."""
    cut: int = 0
    """Number of prompts that were cut."""
    most_cut: tuple[int, str] = (0, "")
    """Tokens that a prompt lost at most, and the example's id."""

    def cut_prompts(self) -> str:
        """Returns a sentence on the prompts that were cut; empty where there is none."""
        if not self.cut:
            return ""
        most, id = self.most_cut
        return f" Cut at {MAX_TEXT_LENGTH} tokens: {self.cut} prompts, the longest, of {id}, by {most}."

    def lost_references(self) -> str:
        """Returns a sentence on the references that were left out of examples; empty where there is none."""
        lost = self.skips.references.most_common()
        return f" References left out: {', '.join(f'{count} {reason}' for reason, count in lost)}." if lost else ""


def _todo(records: _Part, done: frozenset[str], bar: tqdm) -> Iterator[Record | Skipped | Entry]:
    """Yields the records that are not done yet; one whose id was seen before is left out."""
    seen: set[int] = set()  # 64 bits of a hash in place of the id, since there may be millions
    for record in records:
        key = int.from_bytes(hashlib.blake2b(record.id.encode("utf-8", "replace"), digest_size=8).digest())
        if key in seen:
            yield Skipped(id=record.id, reason=REPEATED)
        elif record.id in done:
            bar.initial += 1  # so that it does not count in the rate
            bar.update()
        else:
            yield record
        seen.add(key)


def _describe(config: PrepareConfig, source: Mapping[str, Any], encoders: Encoders, digests: Digests) -> dict[str, Any]:
    """Returns `Manifest.made`."""
    (empty,) = encoders.text.encode([""])
    made = about()
    made["versions"] |= {name: importlib.metadata.version(name) for name in ("av", "pillow", "scikit-image")}
    made |= {"source": dict(source), "settings": config.settings, "encoders": encoders.describe()}
    made["digests"] = weights_digests(made["encoders"], digests)
    made["empty_text"] = [[float(f"{value:.9g}") for value in row] for row in empty.tolist()]
    return made


def _check_ids(records: _Part) -> None:
    """Raises ValueError if two records have one id."""
    ids = collections.Counter(record.id for record in records)
    repeated = [id for id, count in ids.items() if count > 1]
    if repeated:
        raise ValueError(
            f"{len(repeated)} ids are those of several records, such as {repeated[0]!r}; make them unique."
        )


def _drop_changed(records: _Part, writer: ShardWriter, run: _Run) -> str:
    """Takes out the examples whose inputs have changed, if that is wanted.

    Returns:
      Sentences on what was taken out and what is kept unchecked; empty where there is nothing to say.

    Raises:
      ValueError: inputs have changed, but `redo` is not set.
    """
    config = run.config
    found = compare(writer.manifest, records, config.max_references, run.digests, config.workers)
    if not found.changed:
        return str(found)
    if not config.redo:
        first = min(found.changed)
        metadata = writer.read(first)[1]["metadata"]
        entry = next(record for record in records if record.id == first)
        record = entry if isinstance(entry, Record | Skipped) else entry.read()
        assert isinstance(record, Record), first
        files = changed_files(record, metadata.get(INPUTS, {}), config.max_references, run.digests)
        raise ValueError(
            f"{writer.folder} holds {len(found.changed)} examples whose inputs have changed since, such as {first} "
            f"({', '.join(files)}); start with --redo to make them again, or name another folder."
        )
    writer.remove(found.changed)
    return f" Made again, because inputs had changed: {len(found.changed)}.{found}"


def _examples(todo: Iterator[Record | Skipped | Entry], run: _Run, bar: tqdm) -> Iterator[tuple[Example, str]]:
    """Yields the examples of records, in order, each with the digest of its inputs; notes what is left out."""

    def encoded(clips: list[Clip]) -> Iterator[tuple[Example, str]]:
        counts = run.encoders.text.count_tokens([clip.record.prompt for clip in clips])
        for clip, example, tokens in zip(clips, encode_clips(clips, run.encoders), counts, strict=True):
            if tokens > MAX_TEXT_LENGTH:
                run.cut += 1
                run.most_cut = max(run.most_cut, (tokens - MAX_TEXT_LENGTH, clip.record.id))
            if isinstance(example, Skipped):
                run.skips.add(example)
            else:
                run.skips.references.update(entry.reason for entry in clip.record.dropped)
                yield example, clip.inputs
            bar.update()

    def load(record: Record | Skipped | Entry) -> Clip | Skipped:
        return load_record(record, run.config, run.digests)

    clips: list[Clip] = []
    for loaded in in_order(load, todo, run.config.workers, run.config.workers + 1):
        if isinstance(loaded, Skipped):
            run.skips.add(loaded)
            bar.update()
        else:
            clips.append(loaded)
        bar.set_postfix(skipped=run.skips.count, refresh=False)
        if len(clips) == run.config.batch_size:
            yield from encoded(clips)
            clips = []
    if clips:
        yield from encoded(clips)


def _check_settings(folder: epath.Path, config: PrepareConfig, source: Mapping[str, Any]) -> None:
    """Raises ValueError if the folder has a dataset that was begun with other settings."""
    if not (folder / MANIFEST).exists():
        return
    made = read_manifest(folder).made
    before = _OLDER | made.get("settings", {})
    before["augment"] = dataclasses.asdict(AugmentConfig()) | (before.get("augment") or {})
    before |= made.get("source", {}).get("settings", {})
    for name, value in json.loads(json.dumps({**config.settings, **source.get("settings", {})})).items():
        found = json.loads(json.dumps(before.get(name)))
        if found != value:
            raise ValueError(
                f"{folder} was begun with {name}={found}, not {value}; give the same, or name another folder."
            )
