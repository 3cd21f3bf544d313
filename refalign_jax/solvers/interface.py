"""What a solver is, and the quantities that multistep solvers are written in.

A noisy sample is x = α·x₀ + σ·noise with α = 1 - σ, and the velocity is v = noise - x₀. So x₀ = x - σ·v, and multistep
solvers integrate over λ = ln α - ln σ, half of the log of the signal-to-noise ratio.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from refalign_jax.types import Array, Float


class Solver(NamedTuple):
    """A solver with one velocity per step.

    Attributes:
      tables: maps the noise levels σ_0 … σ_N = 0, float64, to what each of the N steps needs: a tree of arrays with a
        leading axis N, which become float32.
      begin: maps the noise to the solver's memory, a tree of arrays.
      step: maps one step's part of the tables, the memory, x at σ_i and v at (x, σ_i) to the memory and x at σ_{i+1}.
    """

    tables: Callable[[Float[np.ndarray, " N+1"]], Any]
    begin: Callable[[Array], Any]
    step: Callable[[Any, Any, Array, Array], tuple[Any, Array]]


def log_snr(sigmas: Float[np.ndarray, " N+1"]) -> Float[np.ndarray, " N+1"]:
    """λ = ln(1 - σ) - ln σ; minus infinity at σ = 1, infinity at σ = 0."""
    with np.errstate(divide="ignore"):
        return np.log1p(-sigmas) - np.log(sigmas)
