"""Flow matching: time schedules, corruption, target, weights.

    σ_i = 1 - i/n,  σ' = s·σ / (1 + (s-1)·σ),  t = 1000·σ'
    x_t = (1 - σ')·x₀ + σ'·noise,  target = noise - x₀
    w(t) = y·1000 / Σy,  y = exp(-2·((t-500)/1000)²) - min exp(…), over the whole schedule

Everything is float32, and tables are computed in float64. In bfloat16, the 1,000 times would collapse to 294 distinct
ones.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from refalign_jax.config import FlowConfig
from refalign_jax.types import Array, Float, Int


class Schedule(NamedTuple):
    """A table of times, float32 [steps], from noise (σ = 1) to data.

    Attributes:
      sigmas: share of noise.
      timesteps: 1000·σ, the transformer's input t.
      weights: training weight of each time, mean 1.
    """

    sigmas: np.ndarray
    timesteps: np.ndarray
    weights: np.ndarray


def schedule(num_steps: int, shift: float) -> Schedule:
    """The shifted schedule of `num_steps` times, without σ = 0.

    Args:
      num_steps: n.
      shift: s, at least 1 for more times near noise.
    """
    uniform = np.linspace(1, 0, num_steps + 1, dtype=np.float64)[:-1]
    sigmas = shift * uniform / (1 + (shift - 1) * uniform)
    timesteps = 1000 * sigmas
    bell = np.exp(-2 * np.square((timesteps - 500) / 1000))
    bell -= bell.min()
    weights = bell * (num_steps / bell.sum()) if bell.any() else np.ones_like(bell)
    return Schedule(*(table.astype(np.float32) for table in (sigmas, timesteps, weights)))


def training_schedule(config: FlowConfig) -> Schedule:
    """The schedule from which training draws an index per sample, uniformly."""
    return schedule(config.num_train_steps, config.shift)


def corrupt(
    x: Float[Array, "B F H W C"], noise: Float[Array, "B F H W C"], sigmas: Float[Array, " B"]
) -> tuple[Float[Array, "B F H W C"], Float[Array, "B F H W C"]]:
    """Mixes data with noise.

    Args:
      x: clean latents, normalised.
      noise: standard normal.
      sigmas: share of noise of each sample, in [0, 1].

    Returns:
      x_t and the target velocity noise - x, float32.
    """
    x, noise = x.astype(jnp.float32), noise.astype(jnp.float32)
    sigma = sigmas.astype(jnp.float32)[:, None, None, None, None]
    return (1 - sigma) * x + sigma * noise, noise - x


def flow_errors(velocity: Float[Array, "B F H W C"], target: Float[Array, "B F H W C"]) -> Float[Array, " B"]:
    """Mean squared error of each sample, unweighted."""
    return jnp.mean(jnp.square(velocity.astype(jnp.float32) - target), axis=(1, 2, 3, 4))


def lookup(
    table: Schedule, index: Int[Array, " B"]
) -> tuple[Float[Array, " B"], Float[Array, " B"], Float[Array, " B"]]:
    """Looks up σ, t and w at each sample's index into the schedule."""
    return tuple(jnp.asarray(values)[index] for values in table)  # type: ignore[return-value]
