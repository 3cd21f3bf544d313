"""Euler: x ← x + (σ_{i+1} - σ_i)·v."""

from __future__ import annotations

from typing import Any

import numpy as np

from refalign_jax.solvers.interface import Solver
from refalign_jax.types import Array, Float


def _tables(sigmas: Float[np.ndarray, " N+1"]) -> Float[np.ndarray, " N"]:
    return np.diff(sigmas.astype(np.float32))


def _step(width: Array, memory: Any, x: Array, v: Array) -> tuple[Any, Array]:
    return memory, x + width * v


EULER = Solver(_tables, lambda x: (), _step)
