"""Sampling: a solver follows the guided velocity from noise (σ = 1) to a video (σ = 0).

    x ← x + (σ_{i+1} - σ_i)·v,   σ_N = 0                                     Euler; see solvers/ for the others
    v = v(n,0) + s_ref·(v(n,r) - v(n,0)) + s_text·(v(c,r) - v(n,r))

n is the negative prompt, c the prompt, r the references; 0 means as many frames of zero latents, with their tokens and
positions. References stay clean through every step. Alignment takes no part: the transformer alone runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from refalign_jax.config import DiTConfig, SamplingConfig
from refalign_jax.flow import schedule
from refalign_jax.models.condition import Condition
from refalign_jax.models.transformer import velocity
from refalign_jax.solvers import SOLVERS
from refalign_jax.types import Array, Float, Params


def velocities(
    params: Params, dit: DiTConfig, x: Array, t: Array, conditions: Sequence[Condition], batched: bool
) -> list[Float[Array, "B F H W C"]]:
    """The velocity under each of several conditions.

    Args:
      params: of the transformer.
      dit: its configuration.
      x: latents [B, F, H, W, C].
      t: time in [0, 1000], [B].
      conditions: of equal shapes.
      batched: run them as one forward pass of a larger batch, or one after the other.
    """
    if not batched:
        return [velocity(params, dit, x, t, condition) for condition in conditions]
    n = len(conditions)
    joined = jax.tree.map(lambda *parts: jnp.concatenate(parts), *conditions)
    return jnp.split(velocity(params, dit, jnp.tile(x, (n, 1, 1, 1, 1)), jnp.tile(t, n), joined), n)


def guided_velocity(
    v: Callable[..., Sequence[Array]], prompt: Condition, negative: Condition, config: SamplingConfig
) -> Float[Array, "B F H W C"]:
    """The guided velocity of the module's docstring; without references, v(n) + s_text·(v(c) - v(n)).

    Args:
      v: maps conditions to the velocity under each, at the latents and the time of this step.
      prompt: prompt and references.
      negative: negative prompt and the same references.
      config: guidance scales.
    """
    s_ref, s_text = config.reference_guidance, config.text_guidance
    if prompt.reference_latents is None:
        v_n, v_c = v(negative, prompt)
        return v_n + s_text * (v_c - v_n)
    v_n0, v_nr, v_cr = v(negative.without_references(), negative, prompt)
    return v_n0 + s_ref * (v_nr - v_n0) + s_text * (v_cr - v_nr)


@functools.partial(jax.jit, static_argnames=("dit", "config"))
def sample(
    params: Params,
    noise: Float[Array, "B F H W C"],
    prompt: Condition,
    negative: Condition,
    *,
    dit: DiTConfig,
    config: SamplingConfig,
) -> Float[Array, "B F H W C"]:
    """Samples videos; one compiled program holds the whole loop.

    Args:
      params: of the transformer alone.
      noise: standard normal, float32; its shape is the video's.
      prompt: prompt and references.
      negative: negative prompt and the same references.
      dit: the transformer.
      config: solver, steps, shift, guidance.

    Returns:
      Normalised latents, float32.
    """
    table, solver = schedule(config.num_steps, config.shift), SOLVERS[config.solver]
    sigmas = np.append(table.sigmas, np.float32(0)).astype(np.float64)
    coefficients = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), solver.tables(sigmas))

    def step(carry: tuple[Any, Array], inputs: tuple[Array, Any]) -> tuple[tuple[Any, Array], None]:
        (memory, x), (t, row) = carry, inputs

        def v(*conditions: Condition) -> list[Array]:
            return velocities(params, dit, x, jnp.full(x.shape[:1], t), conditions, config.batched_guidance)

        return solver.step(row, memory, x, guided_velocity(v, prompt, negative, config)), None

    x = noise.astype(jnp.float32)
    (_, x), _ = jax.lax.scan(step, (solver.begin(x), x), (jnp.asarray(table.timesteps), coefficients))
    return x
