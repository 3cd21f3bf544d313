"""Sampling: a solver follows the guided velocity from noise (σ = 1) to a video (σ = 0).

    x ← x + (σ_{i+1} - σ_i)·v,   σ_N = 0                                     Euler; see solvers/ for the others
    v = v(n,0) + s_ref·(v(n,r) - v(n,0)) + s_text·(v(c,r) - v(n,r))

n is the negative prompt, c the prompt, r the references; 0 means as many frames of zero latents, with their tokens and
positions. References stay clean through every step. Alignment takes no part: the transformer alone runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from refalign_jax.config import DiTConfig, SamplingConfig
from refalign_jax.models.condition import Condition
from refalign_jax.models.transformer import velocity
from refalign_jax.solvers import SOLVERS
from refalign_jax.types import Array, Float, Int, Params


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

    Branches whose factor is 0, because a guidance scale is 1, are not computed.

    Args:
      v: maps conditions to the velocity under each, at the latents and the time of this step.
      prompt: prompt and references.
      negative: negative prompt and the same references.
      config: guidance scales.
    """
    s_ref, s_text = config.reference_guidance, config.text_guidance
    references = prompt.reference_latents is not None
    branches = config.num_branches(references)
    if branches == 1:
        return v(prompt)[0]
    if not references or s_ref == 1:
        v_n, v_c = v(negative, prompt)
        return v_n + s_text * (v_c - v_n)
    if branches == 2:  # the prompt takes no part
        v_n0, v_nr = v(negative.without_references(), negative)
        return v_n0 + s_ref * (v_nr - v_n0)
    v_n0, v_nr, v_cr = v(negative.without_references(), negative, prompt)
    return v_n0 + s_ref * (v_nr - v_n0) + s_text * (v_cr - v_nr)


def noise_levels(config: SamplingConfig) -> Float[np.ndarray, " N"]:
    """The table of noise levels σ_0 … σ_{N-1} that a configuration names, float64; σ_N = 0 is left out.

    With s the shift and u evenly spaced, σ = s·u / (1 + (s-1)·u); the tables differ in u:

        refalign          from 1 to 0; Wan's DPM++ has the same
        wan, UniPC        from 0.999 to 0; so has diffusers up to 0.36, under the name diffusers-0.36
        diffusers-0.37    from 1 to 0.001, the first σ lowered by 1e-6
    """
    if config.sigma_values:
        return np.asarray(config.sigma_values, np.float64)
    name, count = config.sigmas, config.num_steps + 1
    if name == "wan" and config.solver == "unipc":
        uniform = np.linspace(float(np.float32(0.999)), 0, count)[:-1]  # Wan reads it from a float32
    elif name == "diffusers-0.36":
        uniform = (1 - np.linspace(1, 1e-3, count))[:0:-1]
    else:
        uniform = np.linspace(1, 1e-3 if name == "diffusers-0.37" else 0, count)[:-1]
    sigmas = config.shift * uniform / (1 + (config.shift - 1) * uniform)
    if name == "diffusers-0.37":
        sigmas[0] -= 1e-6
    return sigmas


class State(NamedTuple):
    """Where a sampler stands.

    Attributes:
      memory: of the solver.
      x: latents at the noise level of the next step, float32.
    """

    memory: Any
    x: Float[Array, "B F H W C"]


def begin(noise: Float[Array, "B F H W C"], config: SamplingConfig) -> State:
    """The state before the first step; arguments as in `sample`."""
    x = noise.astype(jnp.float32)
    return State(SOLVERS[config.solver].begin(x), x)


def _tables(config: SamplingConfig) -> tuple[Array, Any]:
    """What each step needs: the time t, [N], and the solver's coefficients."""
    sigmas = noise_levels(config)
    times = np.trunc(1000 * sigmas) if config.integer_timesteps else 1000 * sigmas
    rounded = np.append(sigmas, 0).astype(np.float32).astype(np.float64)
    coefficients = SOLVERS[config.solver].tables(rounded)
    return jnp.asarray(times, jnp.float32), jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), coefficients)


def _stepper(
    params: Params, prompt: Condition, negative: Condition, dit: DiTConfig, config: SamplingConfig
) -> Callable[[State, tuple[Array, Any]], State]:
    """The function that takes a state over one step, given the step's part of `_tables`."""

    def step(state: State, inputs: tuple[Array, Any]) -> State:
        (memory, x), (t, row) = state, inputs

        def v(*conditions: Condition) -> list[Array]:
            return velocities(params, dit, x, jnp.full(x.shape[:1], t), conditions, config.batched_guidance)

        guided = guided_velocity(v, prompt, negative, config)
        return State(*SOLVERS[config.solver].step(row, memory, x, guided))

    return step


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
      config: solver, steps, noise levels, guidance.

    Returns:
      Normalised latents, float32.
    """
    step = _stepper(params, prompt, negative, dit, config)
    state, _ = jax.lax.scan(lambda state, row: (step(state, row), None), begin(noise, config), _tables(config))
    return state.x


@functools.partial(jax.jit, static_argnames=("dit", "config"))
def advance(
    params: Params,
    state: State,
    steps: tuple[Int[Array, ""], Int[Array, ""]],
    conditions: tuple[Condition, Condition],
    *,
    dit: DiTConfig,
    config: SamplingConfig,
) -> State:
    """Takes some of the steps of `sample`; one compiled program serves for any of them.

    So a sampler can report its progress. Whatever the parts into which the steps are divided, the result is the same.

    Args:
      params: as in `sample`.
      state: of `begin`, or of the steps before.
      steps: the first step, from 0, and the step after the last.
      conditions: prompt and negative, as in `sample`.
      dit: as in `sample`.
      config: as in `sample`.

    Returns:
      The state after the steps; after all N, its `x` are the normalised latents.
    """
    step, tables = _stepper(params, *conditions, dit, config), _tables(config)
    first, last = steps
    return jax.lax.fori_loop(
        first, last, lambda i, state: step(state, jax.tree.map(lambda table: table[i], tables)), state
    )
