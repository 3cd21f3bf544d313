"""Shape annotations are checked at run time in every test; JAX stays on the CPU."""

import ast
import contextlib
import functools
import gc
import getpass
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Eight devices to shard over; and since tests compile much and compute little, LLVM optimises nothing.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0")

# One cache of compiled programs for all tests; its keys hold the program and the versions, so it never grows stale.
cache = Path(tempfile.gettempdir()) / f"refalign_jax_{getpass.getuser()}"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import pytest
from jaxtyping import install_import_hook
from support.places import GOLDEN, ROOT


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


if sys.version_info < (3, 12):
    # In Python 3.11, ast.parse, through which commands read their options' descriptions, fails with "AST constructor
    # recursion depth mismatch" if a collection of garbage within it runs code that parses as well. A command has a
    # process of its own, and no such garbage; tests call hundreds in one process.
    ast.parse = functools.wraps(ast.parse)(_without_collection()(ast.parse))

# The method, the transformer and the training step; the models of the encoders check their inputs themselves.
MODELS = sorted(path.stem for path in (ROOT / "refalign_jax/models").glob("[a-z]*.py"))
SHAPED = ["alignment", "caching", "flow", "objective", "sampling", "trainer.step"]
SHAPED += [f"models.{name}" for name in MODELS if name not in ("dinov3", "efficientnet", "streaming", "umt5", "vae")]
hook = install_import_hook([f"refalign_jax.{name}" for name in SHAPED], "beartype.beartype")
hook.__enter__()


def pytest_collection_modifyitems(items):
    """Files with slow tests come first, so that one process does not end with them while the other is idle."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of the golden values."""
    return GOLDEN
