"""Commands in processes of their own, each forked from one that has imported what they need.

A fork takes a tenth of a second, importing JAX several; so hundreds of kills take minutes. The process that is forked
has started none of JAX's devices and has one thread.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from multiprocessing.context import ForkServerContext
from multiprocessing.synchronize import Barrier
from pathlib import Path

from refalign_jax import command

IMPORTED = (
    "refalign_jax.data.prepare",
    "refalign_jax.trainer.loop",
    "refalign_jax.inference.generate",
    "refalign_jax.convert.transfer",
    "refalign_jax.report.page",
)
"""What computes in the commands."""


@functools.cache
def context() -> ForkServerContext:
    """The process to fork from; its environment is this one's at the first call."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(list(IMPORTED))
    return found


class Command:
    """`refalign NAME …` in a process of its own.

    Args:
      name: of the command.
      arguments: its command line.
      output: file to which its output is appended.
      together: where several commands wait for each other before they begin.
    """

    def __init__(self, name: str, arguments: Sequence[object], output: Path, together: Barrier | None = None) -> None:
        given = [name, *map(str, arguments)]
        self._process = context().Process(target=_run, args=(given, output, together))
        self._began = time.monotonic()
        self._process.start()

    def wait(self, seconds: float | None = None) -> bool:
        """Whether it ended in so many seconds from now."""
        self._process.join(seconds)
        return self._process.exitcode is not None

    def kill(self) -> None:
        """Kills it by SIGKILL, and waits until it is gone."""
        assert self._process.pid is not None
        os.kill(self._process.pid, signal.SIGKILL)
        self._process.join()

    @property
    def exit_code(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        return self._process.exitcode

    @property
    def seconds(self) -> float:
        """Time since it was started."""
        return time.monotonic() - self._began


def _run(given: list[str], output: Path, together: Barrier | None) -> None:
    """What a process does."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for number in (1, 2):
        os.dup2(file, number)
    os.close(file)
    sys.argv = ["refalign", *given]
    if together is not None:
        together.wait()
    command.main()
