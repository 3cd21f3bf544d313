"""Sampling: a solver follows the guided velocity from noise (σ = 1) to a video (σ = 0).

    x ← x + (σ_{i+1} - σ_i)·v,   σ_N = 0                                     Euler; see solvers/ for the others
    v = v(n,0) + s_ref·(v(n,r) - v(n,0)) + s_text·(v(c,r) - v(n,r))

n is the negative prompt, c the prompt, r the references; 0 means as many frames of zero latents, with their tokens and
positions. References stay clean through every step. Alignment takes no part: the transformer alone runs.

Two settings save time and change the result: guidance in a part of the steps only (arXiv 2404.07724), and reuse of what
the blocks computed (see caching.py).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from refalign_jax import caching
from refalign_jax.caching import Cache
from refalign_jax.config import DiTConfig, SamplingConfig
from refalign_jax.models.condition import Condition
from refalign_jax.models.transformer import velocity
from refalign_jax.sharding import BATCH, axis_size, constrain
from refalign_jax.solvers import SOLVERS
from refalign_jax.types import Array, Bool, Float, Int, Params


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
    each = [(x, t, condition) for condition in conditions]
    found: list[Array] = _each_branch(lambda one: velocity(params, dit, *one), each, batched)
    return found


def _each_branch(forward: Callable[[Any], Any], branches: Sequence[Any], batched: bool) -> list[Any]:
    """Calls `forward` with each branch's tree of arrays [B, ...], or once with all branches as one batch.

    Where the ambient mesh has more devices for the batch than there are rows, the rows are filled up to one per device.
    So in one batch, the branches of few videos run on different devices.
    """
    B, count = len(jax.tree.leaves(branches[0])[0]), len(branches)
    if not batched or count == 1:
        return [_over_devices(forward, one, B) for one in branches]
    joined = jax.tree.map(lambda *parts: jnp.concatenate(parts), *branches)
    together = _over_devices(forward, joined, B)
    return [jax.tree.map(lambda y, i=i: y[i * B : (i + 1) * B], together) for i in range(count)]


def _over_devices(forward: Callable[[Any], Any], arguments: Any, videos: int) -> Any:
    """Calls `forward` with rows that the devices divide, and returns the rows that were given, on each device."""
    devices = axis_size(*BATCH[0])
    if videos % devices == 0:
        return forward(arguments)
    rows = len(jax.tree.leaves(arguments)[0])
    missing = -rows % devices

    def spread(y: Array) -> Array:
        return constrain(jnp.pad(y, ((0, missing), *((0, 0),) * (y.ndim - 1)), mode="edge"), BATCH)

    def gather(y: Array) -> Array:
        return constrain(y[:rows], PartitionSpec(None, *(PartitionSpec.UNCONSTRAINED,) * (y.ndim - 1)))

    return jax.tree.map(gather, forward(jax.tree.map(spread, arguments)))


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


def guided_steps(config: SamplingConfig) -> Bool[np.ndarray, " N"]:
    """In which steps guidance applies: where σ lies in `guidance_interval`, ends included.

    Raises:
      ValueError: in none.
    """
    sigmas, (low, high) = noise_levels(config), config.guidance_interval
    guided = (low <= sigmas) & (sigmas <= high)
    if not guided.any():
        raise ValueError(
            f"SamplingConfig.guidance_interval={config.guidance_interval} holds none of the {len(sigmas)} noise "
            f"levels, which go from {sigmas[0]:.4g} to {sigmas[-1]:.4g}; without guidance, set both scales to 1."
        )
    return guided


def num_forwards(config: SamplingConfig, references: bool) -> int:
    """How many forward passes of the transformer a video takes, where no step reuses a residual."""
    guided, branches = int(guided_steps(config).sum()), config.num_branches(references)
    return guided * branches + config.num_steps - guided


class State(NamedTuple):
    """Where a sampler stands.

    Attributes:
      memory: of the solver.
      x: latents at the noise level of the next step, float32.
      cache: residuals of the blocks; None where they are not reused.
    """

    memory: Any
    x: Float[Array, "B F H W C"]
    cache: Cache | None = None


class Row(NamedTuple):
    """What one step needs or, with a leading axis N, what all of them need.

    Attributes:
      time: t in [0, 1000].
      coefficients: of the solver.
      guided: whether guidance applies; None where it does in all steps.
      may_reuse: whether residuals may be reused; None without a cache.
    """

    time: Float[Array, "*N"]
    coefficients: Any
    guided: Bool[Array, "*N"] | None
    may_reuse: Bool[Array, "*N"] | None


def begin(
    params: Params,
    noise: Float[Array, "B F H W C"],
    conditions: tuple[Condition, Condition],
    *,
    dit: DiTConfig,
    config: SamplingConfig,
) -> State:
    """The state before the first step; arguments as in `sample` and `advance`.

    Raises:
      ValueError: as `guided_steps` and `caching.begin`.
    """
    x, prompt = noise.astype(jnp.float32), conditions[0]
    cache = None
    if config.cache_threshold:
        references = prompt.reference_latents is not None
        branches = config.num_branches(references)
        without_prompt = references and config.reference_guidance != 1 and config.text_guidance == 0
        more = int(without_prompt and not guided_steps(config).all())
        cache = caching.begin(params, dit, x, prompt, branches + more)
    return State(SOLVERS[config.solver].begin(x), x, cache)


def _tables(config: SamplingConfig, references: bool) -> Row:
    """The rows of all steps, stacked.

    Residuals are not reused in the first step and the last, nor where guidance begins or ends to apply.
    """
    sigmas, guided = noise_levels(config), guided_steps(config) | (config.num_branches(references) == 1)
    times = np.trunc(1000 * sigmas) if config.integer_timesteps else 1000 * sigmas
    rounded = np.append(sigmas, 0).astype(np.float32).astype(np.float64)
    coefficients = SOLVERS[config.solver].tables(rounded)
    may_reuse = np.append(False, guided[1:] == guided[:-1])
    may_reuse[-1] = False
    return Row(
        jnp.asarray(times, jnp.float32),
        jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), coefficients),
        None if guided.all() else jnp.asarray(guided),
        jnp.asarray(may_reuse) if config.cache_threshold else None,
    )


def _stepper(
    params: Params, prompt: Condition, negative: Condition, dit: DiTConfig, config: SamplingConfig
) -> Callable[[State, Row], State]:
    """The function that takes a state over one step, given the step's row of `_tables`."""
    plain = dataclasses.replace(config, reference_guidance=1.0, text_guidance=1.0)

    def step(state: State, row: Row) -> State:
        memory, x, cache = state
        t = jnp.full(x.shape[:1], row.time)
        change: Any = None
        reuse: Any = None
        if cache is not None:
            before, look = (cache.x, jnp.full_like(t, cache.t)), functools.partial(caching.look, params, dit)
            change = cache.change + _over_devices(lambda one: look(*one), (prompt, before, (x, t)), len(x))
            reuse = row.may_reuse & (cache.gain * change < config.cache_threshold)

        def predict(scales: SamplingConfig, residuals: tuple[Array, ...]) -> tuple[Array, tuple[Array, ...], Any]:
            """The guided velocity, all branches' residuals, and the largest of their changes with their number."""
            if reuse is None:
                each = functools.partial(velocities, params, dit, x, t, batched=config.batched_guidance)
                return guided_velocity(lambda *conditions: each(conditions), prompt, negative, scales), (), None
            runs: list[caching.Run] = []
            first = len(residuals) - 1 if scales is plain else 0  # the prompt's is the last

            def v(*conditions: Condition) -> list[Array]:
                given = [(x, t, c, caching.Held(reuse, residuals[first + i])) for i, c in enumerate(conditions)]
                runs.extend(_each_branch(lambda one: caching.run(params, dit, *one), given, config.batched_guidance))
                return [run.velocity for run in runs]

            guided = guided_velocity(v, prompt, negative, scales)
            fresh = (*residuals[:first], *(run.residual for run in runs))
            largest = functools.reduce(jnp.maximum, [run.change for run in runs])
            return guided, (*fresh, *residuals[len(fresh) :]), (largest, jnp.int32(len(runs)))

        residuals = () if cache is None else cache.residuals
        if row.guided is None:
            guided, residuals, found = predict(config, residuals)
        else:
            both = (functools.partial(predict, scales) for scales in (config, plain))
            guided, residuals, found = jax.lax.cond(row.guided, *both, residuals)
        if cache is not None:
            cache = caching.settle(cache, change, reuse, *found)._replace(x=x, t=row.time, residuals=residuals)
        return State(*SOLVERS[config.solver].step(row.coefficients, memory, x, guided), cache)

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
    tables = _tables(config, prompt.reference_latents is not None)
    state = begin(params, noise, (prompt, negative), dit=dit, config=config)
    state, _ = jax.lax.scan(lambda state, row: (step(state, row), None), state, tables)
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
    references = conditions[0].reference_latents is not None
    step, tables = _stepper(params, *conditions, dit, config), _tables(config, references)
    first, last = steps
    return jax.lax.fori_loop(
        first, last, lambda i, state: step(state, jax.tree.map(lambda table: table[i], tables)), state
    )
