"""Small tables on disk that find a name among millions; SQLite, written once and then only read.

A table belongs to a state, such as sizes and times of the files that it was made from; with another state it is made
again. It can be read by several threads and processes.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sqlite3
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from refalign_jax import remote
from refalign_jax.data.stored import size_of


def build(path: Path, columns: str, state: Any, rows: Callable[[], Iterable[tuple[Any, ...]]], also: str = "") -> None:
    """Writes a table, unless it is there with the same state.

    Args:
      path: of the file; its folder is made.
      columns: of the table `found`, in SQL; the first one is the key.
      state: JSON of what the rows depend on.
      rows: yields them; of two with one key the first counts.
      also: another column by which rows are found; empty for none.

    Raises:
      OSError: it can't be written.
    """
    wanted = json.dumps(state)
    if path.is_file():
        with contextlib.suppress(sqlite3.Error):
            if query(path, "SELECT state FROM made") == [(wanted,)]:
                return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    temporary.unlink(missing_ok=True)
    try:
        with contextlib.closing(sqlite3.connect(temporary)) as table:
            table.execute("PRAGMA journal_mode=OFF")
            table.execute("PRAGMA synchronous=OFF")
            table.execute(f"CREATE TABLE found ({columns})")
            places = ",".join("?" * (columns.count(",") + 1))
            table.executemany(f"INSERT OR IGNORE INTO found VALUES ({places})", rows())
            if also:
                table.execute(f"CREATE INDEX also ON found ({also})")
            table.execute("CREATE TABLE made (state)")
            table.execute("INSERT INTO made VALUES (?)", (wanted,))
            table.commit()
        _connection.cache_clear()
        temporary.replace(path)
    except sqlite3.Error as error:
        raise OSError(f"{path} can't be written: {error}.") from error
    finally:
        temporary.unlink(missing_ok=True)


def query(path: Path, sql: str, *values: Any) -> list[tuple[Any, ...]]:
    """Returns the rows that a query finds."""
    table, guard = _connection(os.fspath(path))
    with guard:
        return table.execute(sql, values).fetchall()


@functools.lru_cache(maxsize=16)
def _connection(path: str) -> tuple[sqlite3.Connection, threading.Lock]:
    """Opens a table for reading."""
    return sqlite3.connect(f"file:{path}?mode=ro", uri=True, check_same_thread=False), threading.Lock()


def state_of(places: Iterable[str]) -> list[list[Any]]:
    """What changes when files do: size and time of local ones, size of those at URLs.

    Raises:
      ValueError: a file can't be reached.
    """
    found: list[list[Any]] = []
    for place in places:
        found.append([place, size_of(place), None if remote.is_remote(place) else os.stat(place).st_mtime_ns])
    return found
