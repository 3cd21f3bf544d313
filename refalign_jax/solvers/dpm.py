"""DPM-Solver++(2M), midpoint, first order at both ends (arXiv 2211.01095).

    h = λ_{i+1} - λ_i,  D = m_i + (m_i - m_{i-1})·h / (2·(λ_i - λ_{i-1}))
    x ← (σ_{i+1}/σ_i)·x - α_{i+1}·(e^{-h} - 1)·D

with m_i the prediction of x₀ in step i. The first step and the last have D = m_i.
"""

from __future__ import annotations

import numpy as np

from refalign_jax.solvers.interface import Solver, log_snr
from refalign_jax.types import Array, Float


def _tables(sigmas: Float[np.ndarray, " N+1"]) -> Float[np.ndarray, "N 4"]:
    """σ_i, and the factors of x, m_i and m_{i-1}."""
    lambdas, rows = log_snr(sigmas), []
    last = len(sigmas) - 2
    for i in range(last + 1):
        h = lambdas[i + 1] - lambdas[i]
        gain = -(1 - sigmas[i + 1]) * np.expm1(-h)
        before = lambdas[i] - lambdas[i - 1] if 0 < i < last else np.inf
        share = h / (2 * before) if np.isfinite(before) else 0.0
        rows.append((sigmas[i], sigmas[i + 1] / sigmas[i], gain * (1 + share), -gain * share))
    return np.array(rows)


def _step(row: Array, previous: Array, x: Array, v: Array) -> tuple[Array, Array]:
    predicted = x - row[0] * v
    return predicted, row[1] * x + row[2] * predicted + row[3] * previous


DPM_2M = Solver(_tables, lambda x: 0 * x, _step)
