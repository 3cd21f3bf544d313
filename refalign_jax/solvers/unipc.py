"""UniPC of order 2 with B(h) = e^h - 1, `bh2` (arXiv 2302.04867), first order at both ends.

A step first corrects x with the prediction of x₀ at x, then predicts the next x. With m_i the prediction of x₀ in step
i, h = λ_{i+1} - λ_i, φ = e^{-h} - 1 and r = (λ_{i-1} - λ_i)/h:

    predict   x ← (σ_{i+1}/σ_i)·x - α_{i+1}·φ·(m_i + ½·(m_{i-1} - m_i)/r)
    correct   x ← (σ_{i+1}/σ_i)·x - α_{i+1}·φ·(m_i + ρ₀·(m_{i-1} - m_i)/r + ρ₁·(m_{i+1} - m_i))

where x on the right is that at σ_i, and ρ solves a system of two equations; in first order r⁻¹ is 0 and ρ₁ = ½.
"""

from __future__ import annotations

import numpy as np

from refalign_jax.solvers.interface import Solver, log_snr
from refalign_jax.types import Array, Float

Memory = tuple[Array, Array, Array]
"""x of the step before, corrected, and the predictions of x₀ of the last two steps."""


def _interval(sigmas: np.ndarray, lambdas: np.ndarray, i: int) -> tuple[list[float], list[float]]:
    """Coefficients of the prediction and of the correction over [σ_i, σ_{i+1}].

    Returns:
      Factors of (x, m_i, m_{i-1}) to predict, and of (x, m_i, m_{i-1}, m_{i+1}) to correct.
    """
    h = lambdas[i + 1] - lambdas[i]
    ratio, gain = sigmas[i + 1] / sigmas[i], -(1 - sigmas[i + 1]) * np.expm1(-h)
    before = lambdas[i - 1] - lambdas[i] if 0 < i < len(sigmas) - 2 else -np.inf
    if not np.isfinite(before):
        return [ratio, gain, 0.0], [ratio, gain / 2, 0.0, gain / 2]
    r = before / h
    phi = np.expm1(-h)
    first = phi / -h - 1
    second = first / -h - 0.5
    rho = np.linalg.solve([[1.0, 1.0], [r, 1.0]], [first / phi, 2 * second / phi])
    predict = [ratio, gain * (1 - 0.5 / r), gain * 0.5 / r]
    correct = [ratio, gain * (1 - rho[0] / r - rho[1]), gain * rho[0] / r, gain * rho[1]]
    return predict, correct


def _tables(sigmas: Float[np.ndarray, " N+1"]) -> Float[np.ndarray, "N 9"]:
    """σ_i, four factors to correct x_i, which are 0 in the first step, and three to predict x_{i+1}; last, whether."""
    lambdas = log_snr(sigmas)
    rows, correct = [], [0.0, 0.0, 0.0, 0.0]
    for i in range(len(sigmas) - 1):
        predict, following = _interval(sigmas, lambdas, i)
        rows.append([sigmas[i], *correct, *predict, float(i > 0)])
        correct = following
    return np.array(rows)


def _step(row: Array, memory: Memory, x: Array, v: Array) -> tuple[Memory, Array]:
    before, last, older = memory
    predicted = x - row[0] * v
    corrected = row[1] * before + row[2] * last + row[3] * older + row[4] * predicted
    x = row[8] * corrected + (1 - row[8]) * x
    return (x, predicted, last), row[5] * x + row[6] * predicted + row[7] * last


UNIPC = Solver(_tables, lambda x: (0 * x, 0 * x, 0 * x), _step)
