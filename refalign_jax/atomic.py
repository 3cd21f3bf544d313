"""Files that are written whole or not at all: the one way in which this package writes a file under its final name."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from refalign_jax import remote


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[epath.Path]:
    """Yields a temporary path beside `path`, which takes its name when the block ends and is removed when it raises.

    Args:
      path: of the file, local or `gs://`; its folder exists. A file that is there is replaced. What a killed process of
        this host left of it is removed.

    Raises:
      OSError: the file can't be written, naming `path`; what was there before stays. An OSError without a number,
        which is a sentence of this package, passes as it is.
    """
    final = epath.Path(path)
    temporary = partial_path(final)
    remove_partials(final)
    try:
        yield temporary
        if not remote.is_remote(final):
            with Path(temporary).open("rb") as file:
                os.fsync(file.fileno())
        temporary.replace(final)
    except Exception as error:
        if not remote.is_answer(error) and getattr(error, "errno", None) is None:
            raise
        raise OSError(f"{final} can't be written: {remote.reason(error)}.") from error
    finally:
        with contextlib.suppress(Exception):  # a store's client has errors of its own
            temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes text as UTF-8 through `atomic_write`.

    Raises:
      OSError: the file can't be written; what was there before stays.
    """
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def partial_path(path: epath.Path) -> epath.Path:
    """The name beside a path under which a file or folder is written; it names this host and this process."""
    return path.parent / f"{_partial_prefix(path)}{os.getpid()}.partial"


def _partial_prefix(path: epath.Path) -> str:
    host = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:6]
    return f".{path.name}.{host}-"


def remove_partials(path: epath.Path) -> None:
    """Removes what this process, or a process of this host that no longer exists, left of a local file or folder."""
    prefix = _partial_prefix(path)
    with contextlib.suppress(OSError):
        for left in [] if remote.is_remote(path) else os.scandir(path.parent):
            found = re.match(r"(\d+)\.partial", left.name[len(prefix) :]) if left.name.startswith(prefix) else None
            if found is None or (int(found[1]) != os.getpid() and _exists(int(found[1]))):
                continue
            if left.is_dir(follow_symlinks=False):
                shutil.rmtree(left, ignore_errors=True)
            else:
                os.unlink(left)


def _exists(process: int) -> bool:
    """Whether there is a process of this number on this host."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # it is another user's
        pass
    return True


def first_line(error: BaseException) -> str:
    """The cause of an error in one line without a full stop, to be quoted in a sentence.

    TensorStore's messages run over pages; where one quotes the operating system, that is the line. What it quotes of an
    object store's answer is left out.
    """
    line = (str(error).splitlines() or [type(error).__name__])[0].partition(" [http_response")[0].strip().rstrip(".")
    quoted = re.search(r": ([^:]+) \[os_error_code", line)
    return quoted[1] if quoted else line[:300]
