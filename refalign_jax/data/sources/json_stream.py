"""The entries of a JSON object that is too large to be held, one after the other.

`{"key": value, "key": value, …}`: the bytes of each value are found without parsing them, so that what is not needed
costs little, and what is needed can be parsed elsewhere. A file may lie at a URL, or in a zip, which is read without
unpacking it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import zipfile
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from refalign_jax.data.stored import open_bytes, size_of

CHUNK = 1 << 20
"""Bytes read at once."""
MOST = 1 << 28
"""Bytes that a value may have."""
_SAMPLE = 8 << 20
"""Bytes from which the number of entries is estimated."""

_KEY = re.compile(rb'\s*(,?)\s*"((?:[^"\\]++|\\.)*+)"\s*:\s*(?=[^\s])')
_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"|["{}\[\]]', re.DOTALL)
_PLAIN = re.compile(rb'(?:"(?:[^"\\]++|\\.)*+"|[^\s,}\]{\["]++)(?=[\s,}])')
_PART = re.compile(rb'\s*,?\s*(?:"(?:[^"\\]++|\\.)*+\\?(?:"\s*:?\s*)?)?', re.DOTALL)
_END = re.compile(rb"\s*}\s*")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One entry of the object."""

    key: str
    value: bytes
    """JSON, not parsed."""
    start: int
    """Place of the value in the file; in the unpacked one, if it is zipped."""


class BrokenFileError(ValueError):
    """The rest of a file can't be read; what came before is whole."""


@contextlib.contextmanager
def open_json(place: str) -> Iterator[tuple[BinaryIO, int]]:
    """Opens a JSON file, or the only one in a zip; yields it and its number of bytes.

    Raises:
      ValueError: it can't be opened, or is a zip without exactly one JSON file.
    """
    with open_bytes(place) as file:
        if not place.endswith(".zip"):
            yield file, size_of(place)
            return
        try:
            with zipfile.ZipFile(file) as packed:
                found = [info for info in packed.infolist() if info.filename.endswith(".json")]
                if len(found) != 1:
                    raise ValueError(f"{place} holds {len(found)} JSON files; expected one.")
                with packed.open(found[0]) as member:
                    yield member, found[0].file_size  # type: ignore[misc]
        except zipfile.BadZipFile as error:
            raise ValueError(f"{place} is not a zip that can be read: {error}.") from error


def read_entries(place: str) -> Iterator[Entry]:
    """Yields the entries of a JSON object in their order.

    Raises:
      ValueError: the file can't be opened, or is not an object.
      BrokenFileError: it is cut or damaged, after the entries before that place.
    """
    with open_json(place) as (file, _):
        yield from _Scanner(file, place).entries()


def estimate_entries(place: str) -> int:
    """Estimates the number of entries from the first megabytes of a file.

    Raises:
      ValueError: it can't be opened, or is not an object.
    """
    with open_json(place) as (file, size):
        scanner, count, end = _Scanner(file, place), 0, 0
        with contextlib.suppress(BrokenFileError):
            for entry in scanner.entries():
                count, end = count + 1, entry.start + len(entry.value)
                if end > _SAMPLE:
                    return round(count * size / end)
    return count


class _Scanner:
    """Finds keys and the ends of values in a stream of bytes."""

    def __init__(self, file: BinaryIO, place: str) -> None:
        self._file, self._place = file, place
        self._buffer, self._at, self._base, self._count = b"", 0, 0, 0
        self._last = False

    def _more(self) -> bool:
        """Reads on, dropping what lies before the current place; false at the end of the file."""
        try:
            chunk = self._file.read(CHUNK)
        except (OSError, EOFError, zlib.error, zipfile.BadZipFile) as error:
            raise self._broken(f"can't be read on: {error}") from error
        self._buffer = self._buffer[self._at :] + chunk
        self._base, self._at = self._base + self._at, 0
        if len(self._buffer) > MOST:
            raise self._broken(f"has an entry of more than {MOST >> 20} MiB")
        return bool(chunk)

    def _broken(self, what: str) -> BrokenFileError:
        return BrokenFileError(f"{self._place} {what}; the {self._count} entries before are used.")

    def entries(self) -> Iterator[Entry]:
        """Yields all entries."""
        while self._more() and not self._buffer.strip():
            pass
        head = re.match(rb"(?:\xef\xbb\xbf)?\s*{", self._buffer)
        if not head:
            raise ValueError(f'{self._place} does not begin with {{; expected a JSON object {{"id": {{…}}, …}}.')
        self._at = head.end()
        while True:
            key = self._key()
            if key is None:
                return
            start, end = self._value()
            value = self._buffer[self._at : end]
            self._at = end
            self._count += 1
            yield Entry(key, value, start)

    def _key(self) -> str | None:
        """Reads a comma and a key; None at the end of the object."""
        while True:
            found = _KEY.match(self._buffer, self._at)
            if found and bool(found[1]) == bool(self._count):
                self._at = found.end()
                try:
                    return json.loads(b'"' + found[2] + b'"')
                except ValueError as error:
                    raise self._broken(f"has a key that is not JSON at byte {self._base + found.start(2)}") from error
            place = self._base + self._at
            ended = _END.fullmatch(self._buffer, self._at)
            if not ended and not _PART.fullmatch(self._buffer, self._at):
                rest = self._buffer[self._at : self._at + 60].strip()
                raise self._broken(f"is not JSON at byte {place}, {rest[:20]!r}")
            if not self._more():
                if ended:
                    return None
                raise self._broken("ends in the middle")

    def _value(self) -> tuple[int, int]:
        """Finds the end of the value that begins here; returns its place in the file and its end in the buffer."""
        start, depth, place = self._base + self._at, 0, self._at
        while True:
            if depth == 0 and self._buffer[self._at : self._at + 1] not in (b"{", b"["):
                plain = _PLAIN.match(self._buffer, self._at)
                if plain:
                    return start, plain.end()
                done = place = self._at
            else:
                done = place
                for token in _TOKEN.finditer(self._buffer, place):
                    kind = token[0]
                    if kind == b'"':  # a string that goes on beyond the buffer
                        done = token.start()
                        break
                    done = token.end()
                    if kind in (b"{", b"["):
                        depth += 1
                    elif kind in (b"}", b"]"):
                        depth -= 1
                        if depth == 0:
                            return start, done
                else:
                    done = len(self._buffer)
            before = self._at
            if not self._more():
                raise self._broken("ends in the middle")
            place = done - before


def parse(value: bytes) -> dict[str, object]:
    """Parses an entry.

    Raises:
      ValueError: it is not a JSON object.
    """
    try:
        found = json.load(io.BytesIO(value))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError(f"it is {found!r:.40} and not an object")
    return found
