"""What a run of preparation leaves out, and why: counted by reason, listed in a file, printed as a table."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from types import TracebackType

from etils import epath

from refalign_jax.atomic import atomic_write
from refalign_jax.data.records import Skipped

SKIPPED = "skipped.jsonl"


class SkipLog:
    """Counts the records that are left out, and writes `skipped.jsonl` when it is closed; a context manager.

    The list grows on disk, in the system's temporary folder, since millions may be left out.

    Args:
      folder: the dataset's, which exists when the log is closed.
    """

    def __init__(self, folder: epath.Path) -> None:
        self._folder = folder
        self._lines = tempfile.TemporaryFile()  # noqa: SIM115
        self.reasons: collections.Counter[str] = collections.Counter()
        self.first: Skipped | None = None
        """The first record that was left out."""
        self.references: collections.Counter[str] = collections.Counter()
        """References that records lost, by reason."""

    @property
    def count(self) -> int:
        """Number of records left out."""
        return sum(self.reasons.values())

    def add(self, entry: Skipped) -> None:
        """Notes a record that is left out."""
        self.reasons[entry.reason] += 1
        self.first = self.first or entry
        line = json.dumps(dataclasses.asdict(entry), ensure_ascii=False)
        self._lines.write(f"{line}\n".encode("utf-8", "replace"))

    def __str__(self) -> str:
        """How many records were left out for which reason, the most frequent first."""
        if not self.reasons:
            return "none was left out"
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.reasons.most_common())
        return f"{self.count} left out ({reasons}; see {SKIPPED})"

    def __enter__(self) -> SkipLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        try:
            self._lines.seek(0)
            with atomic_write(self._folder / SKIPPED) as temporary, temporary.open("wb") as file:
                shutil.copyfileobj(self._lines, file)
        finally:
            self._lines.close()


def read_skipped(folder: str | os.PathLike[str]) -> Iterable[Skipped]:
    """Yields what is listed in the `skipped.jsonl` of a dataset and of its parts.

    Raises:
      ValueError: a line is not as it was written.
    """
    place = epath.Path(folder)
    for path in sorted([*place.glob(SKIPPED), *place.glob(f"part-*/{SKIPPED}")]):
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    yield Skipped(**json.loads(line))
                except (ValueError, TypeError) as error:
                    raise ValueError(f"{path}, line {number} is not as tools/prepare.py wrote it: {error}.") from error


def table(skipped: Iterable[Skipped]) -> str:
    """A table of what was left out: how many by reason, the most frequent first, and an example of each.

    Returns:
      Lines; empty where nothing was left out.
    """
    counts: collections.Counter[str] = collections.Counter()
    examples: dict[str, Skipped] = {}
    for entry in skipped:
        counts[entry.reason] += 1
        examples.setdefault(entry.reason, entry)
    if not counts:
        return ""
    width = max(len(reason) for reason in counts)
    lines = [f"{'left out':>8}  {'reason':{width}}  such as"]
    for reason, count in counts.most_common():
        example = examples[reason]
        lines.append(f"{count:8d}  {reason:{width}}  {example.detail or example.id}"[:240])
    return "\n".join(lines)
