"""Where things are, and the environment in which tests start other processes."""

import os
from pathlib import Path

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
GOLDEN = TESTS / "golden"
WORKER = Path(__file__).parent / "worker.py"


def environment(**more: str) -> dict[str, str]:
    """This process's environment, with this checkout's package and the tests' helpers first on the path."""
    paths = [str(ROOT), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | more
