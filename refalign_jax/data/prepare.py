"""Records to prepared examples: read, encode, write, once; training reads the result alone.

Records are read ahead in threads, and the encoders run in this one; or both are Ray's (ray_engine.py), which spreads
them over processes and machines and gives the same bytes. Everything random about a record depends on its id and
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
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any

from etils import epath
from tqdm import tqdm

from refalign_jax.config import MAX_TEXT_LENGTH, AugmentConfig, PrepareConfig
from refalign_jax.data.clips import INPUTS, Clip, load_record
from refalign_jax.data.encode import Described, Made, describe_encoders, encode_in_batches
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
    with contextlib.ExitStack() as stack:
        digests = stack.enter_context(Digests(place))
        described, make = _open_engine(config, place, digests)
        made = _describe(source, config, described, digests)
        size = config.examples_per_shard
        writer = stack.enter_context(ShardWriter(place, storage=config.storage, made=made, examples_per_shard=size))
        _check_settings(place, config, source)  # another process may have begun it since
        run = _Run(config=config, make=make, digests=digests, skips=stack.enter_context(SkipLog(place)))
        kept = _drop_changed(mine, writer, run)
        done, new = writer.done, 0
        total = operator.length_hint(mine) or None
        with tqdm(total=total, initial=min(len(done), total or 0), unit="record", desc="prepare") as bar:
            for example, inputs in _examples(Todo(mine, done), run, bar):
                writer.add(example, inputs)
                new += 1
            bar.total = bar.n  # it may have been an estimate
        if not new and not done and parts == 1:
            first = f" The first: {run.skips.first.detail}" if run.skips.first and run.skips.first.detail else ""
            raise ValueError(f"No record became an example in {place}: {run.skips}.{first}")
    notes = f"{run.skips}.{kept}{run.cut_prompts()}{run.lost_references()}"
    joined = f" {join_parts(whole, parts)}" if parts > 1 else ""
    return f"{len(done) + new} examples are in {place}, {new} of them new; {notes}{joined}"


def _open_engine(
    config: PrepareConfig, place: epath.Path, digests: Digests
) -> tuple[Described, Callable[[Todo], Iterator[Made | Skipped]]]:
    """Opens what reads and encodes: threads of this process, or Ray.

    Returns:
      What the manifest says of the encoders, and a function from records to what becomes of each, in their order.

    Raises:
      ValueError: the encoders don't fit, or Ray is not installed.
    """
    if config.engine == "ray":
        from refalign_jax.data.ray_engine import RayEngine  # an optional package

        engine = RayEngine(config, place)
        return engine.describe(), engine.make
    encoders = open_encoders(config)
    return describe_encoders(encoders), lambda todo: _in_threads(todo, config, encoders, digests)


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
    make: Callable[[Todo], Iterator[Made | Skipped]]
    """Reads and encodes records."""
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


class Todo:
    """The records that are not done yet, one after the other; one whose id was seen before is left out.

    Args:
      records: of the source.
      done: ids of the finished examples.
    """

    def __init__(self, records: Records, done: Set[str]) -> None:
        self._records, self._done = records, done

    def __iter__(self) -> Iterator[Record | Skipped | Entry]:
        seen: set[int] = set()  # 64 bits of a hash in place of the id, since there may be millions
        for record in self._records:
            key = int.from_bytes(hashlib.blake2b(record.id.encode("utf-8", "replace"), digest_size=8).digest())
            if key in seen:
                yield Skipped(id=record.id, reason=REPEATED)
            elif record.id not in self._done:
                yield record
            seen.add(key)


def _describe(
    source: Mapping[str, Any], config: PrepareConfig, encoders: Described, digests: Digests
) -> dict[str, Any]:
    """Returns `Manifest.made`."""
    made = about()
    made["versions"] |= {name: importlib.metadata.version(name) for name in ("av", "pillow", "scikit-image")}
    made |= {"source": dict(source), "settings": config.settings, "encoders": encoders.about}
    made["digests"] = weights_digests(made["encoders"], digests)
    made["empty_text"] = [[float(f"{value:.9g}") for value in row] for row in encoders.empty_text.tolist()]
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


def _examples(todo: Todo, run: _Run, bar: tqdm) -> Iterator[tuple[Example, str]]:
    """Yields the examples of records, in order, each with the digest of its inputs; notes what is left out."""
    for made in run.make(todo):
        bar.set_postfix(skipped=run.skips.count, refresh=False)
        bar.update()
        if isinstance(made, Skipped):
            run.skips.add(made)
            continue
        if made.cut:
            run.cut += 1
            run.most_cut = max(run.most_cut, (made.cut, made.example.id))
        run.skips.references.update(entry.reason for entry in made.dropped)
        yield made.example, made.inputs


def _in_threads(todo: Todo, config: PrepareConfig, encoders: Encoders, digests: Digests) -> Iterator[Made | Skipped]:
    """Reads records in threads, a few ahead, and encodes them in this one."""

    def load(record: Record | Skipped | Entry) -> Clip | Skipped:
        return load_record(record, config, digests)

    loaded = in_order(load, todo, config.workers, config.workers + 1)
    return encode_in_batches(loaded, encoders, config.batch_size)


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
