"""Digests of the files of a checkpoint: written when it is saved, checked before it is used.

Every item of a checkpoint (`params`, `ema`, `optimizer`, `config`, `progress`) holds the file `digests.json`, which is
written before the checkpoint is committed: a digest of each 4 MiB block of each of the item's files. The hash is
XXH3 of 128 bits, which finds accidental damage as surely as SHA-256 does, at ten times its speed; it is no protection
against someone who changes files on purpose. Blocks are hashed by several threads, and a damaged block leads to the
arrays that lie in it. Orbax's marks that a folder is committed are written later and hold nothing that is read; they
have no digest.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import urllib.parse
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import orbax.checkpoint as ocp
import tensorstore as ts
import xxhash
from etils import epath

from refalign_jax.atomic import first_line, write_text

BLOCK_BYTES = 4 * 2**20
"""Bytes of which each digest is; the last block of a file may be shorter."""
BLOCKS_PER_READ = 16
"""Blocks that one thread reads at once from one file."""
FILE = "digests.json"
KEY = "xxh3_128_of_4_mib_blocks"
HASHES: dict[str, Callable[[bytes], str]] = {
    KEY: xxhash.xxh3_128_hexdigest,
    "sha256_of_4_mib_blocks": lambda block: hashlib.sha256(block).hexdigest(),  # until 2026-11-26
}
"""The key in `FILE` and the hash that it stands for; `KEY` is written."""
MARKS = ("commit_success.txt", FILE)
"""Files of an item that have no digest."""

logger = logging.getLogger(__name__)


class DamagedError(ValueError):
    """A file of a checkpoint is missing or is not what was written; the message names it."""


class DigestedArrays(ocp.PyTreeCheckpointHandler):
    """Orbax's handler of arrays, which writes the digests of an item's files when all of them are written."""

    def finalize(self, directory: epath.Path) -> None:
        """Ends the writing of an item; Orbax calls it in process 0, before it commits the checkpoint."""
        super().finalize(directory)
        write_digests(directory)


class DigestedJson(ocp.JsonCheckpointHandler):
    """Orbax's handler of JSON, which writes the digests of an item's files when all of them are written."""

    def finalize(self, directory: epath.Path) -> None:
        """As `DigestedArrays.finalize`."""
        super().finalize(directory)
        write_digests(directory)


@ocp.args.register_with_handler(DigestedArrays, for_save=True)
class ArraysSave(ocp.args.PyTreeSave):
    """Orbax's arguments to save a tree of arrays with digests."""


@ocp.args.register_with_handler(DigestedArrays, for_restore=True)
class ArraysRestore(ocp.args.PyTreeRestore):
    """Orbax's arguments to restore what `ArraysSave` saved."""


@ocp.args.register_with_handler(DigestedJson, for_save=True)
class JsonSave(ocp.args.JsonSave):
    """Orbax's arguments to save JSON with digests."""


@ocp.args.register_with_handler(DigestedJson, for_restore=True)
class JsonRestore(ocp.args.JsonRestore):
    """Orbax's arguments to restore what `JsonSave` saved."""


def write_digests(item: epath.Path) -> None:
    """Writes the digests of an item's files into its folder.

    Raises:
      OSError: a file can't be read, or the digests can't be written.
    """
    item = epath.Path(item)
    names = sorted(_names(item, ""))
    reads = [(name, start) for name in names for start in _starts((item / name).stat().length)]
    digests: dict[str, list[str]] = {name: [] for name in names}
    for (name, _), found in zip(reads, hash_blocks(item, reads), strict=True):
        digests[name] += found
    write_text(item / FILE, json.dumps({KEY: digests}))


def check_digests(
    checkpoint: epath.Path, items: Iterable[str], warn: bool = True, share: tuple[int, int] = (0, 1)
) -> None:
    """Compares the files of a checkpoint with the digests that were written with them.

    Args:
      checkpoint: its folder.
      items: which of its items; those that it does not have are left out.
      warn: log a line if an item has no digests, having been written before there were any.
      share: index and number of processes that check the same folder together; each reads its share of the blocks.

    Raises:
      DamagedError: a file is missing or damaged; the message names it, and where that can be found out the arrays
        that lie in the damaged part.
      OSError: a file can't be read.
    """
    without = []
    for item in items:
        folder = epath.Path(checkpoint) / item
        if not folder.is_dir():
            continue
        if not (folder / FILE).exists():
            without.append(item)
            continue
        _check_item(folder, share)
    if without and warn:
        logger.warning("%s has no digests of its %s; they are read unchecked.", checkpoint, ", ".join(without))


def _check_item(item: epath.Path, share: tuple[int, int]) -> None:
    """`check_digests` for one item."""
    key, expected = _read_digests(item)
    for name in expected:
        if not (item / name).exists():
            raise DamagedError(f"{item / name} is missing.")
    lengths = {name: (item / name).stat().length for name in expected}
    reads = [(name, start) for name, length in lengths.items() for start in _starts(length)][share[0] :: share[1]]
    for (name, start), found in zip(reads, hash_blocks(item, reads, HASHES[key]), strict=True):
        written = expected[name][start : start + BLOCKS_PER_READ]
        differ = [index for index, (a, b) in enumerate(zip(written, found, strict=False)) if a != b]
        if differ:
            raise DamagedError(_damage(item, name, start + differ[0]))
    for name, length in lengths.items():
        if -(-length // BLOCK_BYTES) != len(expected[name]):
            raise DamagedError(f"{item / name} is damaged: {length:,} bytes are more or fewer than were written.")


def _read_digests(item: epath.Path) -> tuple[str, dict[str, list[str]]]:
    """Reads what `write_digests` wrote, and one of the keys of `HASHES`."""
    path = item / FILE
    try:
        ((key, values),) = json.loads(path.read_bytes()).items()
        if key in HASHES and all(isinstance(digests, list) for digests in values.values()):
            return key, values
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{path} is damaged: {first_line(error)}.") from error
    raise DamagedError(f"{path} is damaged: it holds no lists of digests.")


def hash_blocks(
    item: epath.Path, reads: list[tuple[str, int]], digest: Callable[[bytes], str] = HASHES[KEY]
) -> Iterator[list[str]]:
    """Digests of up to `BLOCKS_PER_READ` blocks from each of several places (file, first block), in their order."""

    def run(read: tuple[str, int]) -> list[str]:
        name, start = read
        with (item / name).open("rb") as file:
            file.seek(start * BLOCK_BYTES)
            blocks = iter(lambda: file.read(BLOCK_BYTES), b"")
            return [digest(block) for _, block in zip(range(BLOCKS_PER_READ), blocks, strict=False)]

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        try:
            yield from threads.map(run, reads)
        finally:
            threads.shutdown(cancel_futures=True)


def _starts(length: int) -> range:
    """First blocks of the reads of a file of so many bytes."""
    return range(0, -(-length // BLOCK_BYTES), BLOCKS_PER_READ)


def _names(folder: epath.Path, prefix: str) -> Iterator[str]:
    """Names of the files below a folder that have digests."""
    for path in folder.iterdir():
        if path.is_dir():
            yield from _names(path, f"{prefix}{path.name}/")
        elif path.name not in MARKS:
            yield prefix + path.name


def _damage(item: epath.Path, name: str, block: int) -> str:
    """States which block is damaged, and the arrays in it."""
    start = block * BLOCK_BYTES
    stop = start + BLOCK_BYTES
    arrays = _arrays_between(item, name, start, stop)
    more = f" and {len(arrays) - 3} more arrays" if len(arrays) > 3 else ""
    where = f" in {', '.join(arrays[:3])}{more}" if arrays else ""
    return f"{item / name} is damaged{where}: its bytes from {start:,} to {stop:,} are not those that were written."


def _arrays_between(item: epath.Path, name: str, start: int, stop: int) -> list[str]:
    """Names of the arrays that have values in a part of a data file; empty where the index can't be read."""
    base = os.fspath(item)
    arrays = set()
    try:
        store = ts.KvStore.open(f"{store_url(base)}/").result()
        for key, file, offset, length in stored_values(store):
            if file == name and offset < stop and start < offset + length:
                arrays.add(key.rpartition("/")[0])
    except (ValueError, LookupError, OSError):
        return []
    return sorted(arrays)


def store_url(path: str) -> str:
    """The URL by which TensorStore opens a folder, local or `gs://`."""
    scheme, colon, rest = path.partition("://")
    return f"{scheme}://{urllib.parse.quote(rest)}" if colon else f"file://{urllib.parse.quote(path)}"


def stored_values(store: ts.KvStore) -> Iterator[tuple[str, str, int, int]]:
    """Key, file, offset and length of every value in OCDBT's index that is large enough to be stored in a data file."""
    nodes: list[Any] = [ts.ocdbt.dump(store).result()["versions"][-1]["root"]["location"]]
    while nodes:
        for entry in ts.ocdbt.dump(store, nodes.pop()).result()["entries"]:
            if "location" in entry:
                nodes.append(entry["location"])
            elif "indirect_value" in entry:
                _, folder, rest = entry["indirect_value"].split(":", 2)
                file, offset, length = rest.rsplit(":", 2)
                yield entry["key"].decode(), folder + file, int(offset), int(length)
