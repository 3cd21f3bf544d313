"""Progress of slow work on stderr, so that what a command prints on stdout stays its result."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator


@contextlib.contextmanager
def progress(what: str) -> Iterator[None]:
    """Prints what begins, such as "compiling", and when the block ends the seconds that it took.

    Blocks are not nested: each prints one line.
    """
    print(f"{what} ...", end=" ", file=sys.stderr, flush=True)
    began, end = time.perf_counter(), "failed after "
    try:
        yield
        end = ""
    finally:
        print(f"{end}{time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)
