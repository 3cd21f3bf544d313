"""Ctrl-C while a command still imports what it needs ends it with a sentence and without a traceback.

`command` imports this module before any other, and each file under tools/ imports `command` first. From its first line
on, `command.exit_with` takes over.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

INTERRUPTED = "Interrupted; start the same command again to continue."
"""The last line of a command that Ctrl-C ended; its exit code is 130."""


def is_command() -> bool:
    """Whether this process was started as `refalign NAME` or as a file of a folder tools/."""
    started = Path(sys.argv[0] if sys.argv else "")
    return started.stem == "refalign" or started.parent.absolute().name == "tools"


def leave(number: int, frame: object) -> None:
    """Ends the process at once; nothing has begun that would have to be undone."""
    os.write(2, f"{INTERRUPTED}\n".encode())
    os._exit(130)


if is_command() and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, leave)
