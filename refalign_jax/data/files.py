"""The check that a path a user names is a file that can be read to its end."""

from __future__ import annotations

import os
import stat


def check_file(path: str | os.PathLike[str], what: str) -> None:
    """Checks that a path leads to a regular file, without opening it.

    Opening a FIFO would wait for a writer, and a device may have no end.

    Args:
      path: the path.
      what: what the file should be, for the message, such as "an image".

    Raises:
      ValueError: nothing is there, it can't be reached, or it is a folder, a FIFO, a socket or a device.
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"{path} does not exist; expected {what}.") from error
    except OSError as error:
        raise ValueError(f"{path} can't be read as {what}: {error.strerror}.") from error
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)!r} is not a path: {error}.") from error
    if not stat.S_ISREG(mode):
        found = "a folder" if stat.S_ISDIR(mode) else "a FIFO, a socket or a device"
        raise ValueError(f"{path} is {found}; expected {what}.")
