"""How a file came to be: versions, flags, commit, devices, command and time."""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

import refalign_jax

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
PLUGINS = ("libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin")


def about() -> dict[str, Any]:
    """Versions, flags, commit, devices, command and time, for every file that a run writes."""
    installed = [name for name in PLUGINS if importlib.util.find_spec(name.replace("-", "_"))]
    return {
        "command": shlex.join(sys.argv),
        "refalign_jax": refalign_jax.__version__,
        "commit": _commit(),
        "python": sys.version.split()[0],
        "versions": {name: importlib.metadata.version(name) for name in (*PACKAGES, *installed)},
        "flags": {
            name: value
            for name, value in sorted(os.environ.items())
            if name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS") or name.startswith(("JAX_", "NCCL_"))
        },
        "devices": f"{jax.device_count()} {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _commit() -> str:
    """The commit of the clone that this code is in, or "unknown": outside of one, or where git is not installed."""
    folder = str(Path(__file__).parent)
    command = ["git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return found.stdout.strip() or "unknown"
