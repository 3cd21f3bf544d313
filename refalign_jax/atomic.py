"""Files that are written whole or not at all: the one way in which this package writes a file under its final name."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from etils import epath


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[epath.Path]:
    """Yields a temporary path beside `path`, which takes its name when the block ends and is removed when it raises.

    Args:
      path: of the file, local or `gs://`; its folder exists. A file that is there is replaced.

    Raises:
      OSError: the file can't be written, naming `path`; what was there before stays. An OSError without a number,
        which is a sentence of this package, passes as it is.
    """
    final = epath.Path(path)
    temporary = final.parent / f".{final.name}.{os.getpid()}.partial"
    try:
        yield temporary
        if "://" not in os.fspath(final):
            with Path(temporary).open("rb") as file:
                os.fsync(file.fileno())
        temporary.replace(final)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(f"{final} can't be written: {error.strerror or error}.") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes text as UTF-8 through `atomic_write`.

    Raises:
      OSError: the file can't be written; what was there before stays.
    """
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def first_line(error: BaseException) -> str:
    """The cause of an error in one line without a full stop, to be quoted in a sentence.

    TensorStore's messages run over pages; where one quotes the operating system, that is the line.
    """
    line = (str(error).splitlines() or [type(error).__name__])[0].strip().rstrip(".")
    quoted = re.search(r": ([^:]+) \[os_error_code", line)
    return quoted[1] if quoted else line[:300]
