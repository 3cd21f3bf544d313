"""Shape annotations are checked at run time in every test; JAX stays on the CPU."""

import getpass
import os
import tempfile
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

hook = install_import_hook(
    [
        "refalign_jax.alignment",
        "refalign_jax.flow",
        "refalign_jax.objective",
        "refalign_jax.sampling",
        "refalign_jax.models.attention",
        "refalign_jax.models.dit",
        "refalign_jax.models.layers",
        "refalign_jax.models.rope",
    ],
    "beartype.beartype",
)
hook.__enter__()

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of the golden values."""
    return GOLDEN
