"""A cache of what the blocks add to the video tokens, for steps in which that changes little.

The residual is r = (video tokens after the last block) - (video tokens before the first). A step that reuses it runs no
block: its tokens are those that enter, plus the residual of the last step that ran the blocks. Whether a step may is
estimated from m, the time-modulated input of the first block, which is cheap:

    a ← a + |m_i - m_{i-1}| / |m_{i-1}|                 accumulated since the blocks ran last; |.| is the L1 norm
    reuse r where g·a < threshold                       g·a estimates the relative change of r
    else run the blocks;  g ← (|r_new - r| / |r|) / a,  a ← 0,  r ← r_new

The accumulated change is TeaCache's (arXiv 2411.19108), which turns it into a change of the output by a polynomial that
is fitted to each checkpoint. Here the factor g is measured while sampling, whenever the blocks run, as EasyCache
(arXiv 2507.02860) measures its rate. So there is nothing to calibrate, and the threshold is a relative change of r.

Each video decides for itself: its result does not depend on the others of its batch. The blocks run if one video of the
batch needs them, so a batch saves what its worst video saves. All branches of guidance decide alike, by the largest
change among them.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from refalign_jax.config import DiTConfig
from refalign_jax.models import transformer
from refalign_jax.models.condition import Condition
from refalign_jax.models.dit import Observer, embed, run_blocks, unembed, velocity
from refalign_jax.models.gradients import modulated_norm
from refalign_jax.sharding import BATCH, SEQUENCE, TOKENS, axis_size, constrain
from refalign_jax.types import Array, Bool, Float, Int, Params


class Cache(NamedTuple):
    """What a sampler remembers of the steps before.

    Attributes:
      x: latents of the step before.
      t: its time, in [0, 1000].
      change: a of the module's docstring.
      gain: g, infinite until it is measured.
      residuals: r of each branch.
      runs: number of forward passes in which the blocks ran.
    """

    x: Float[Array, "B F H W C"]
    t: Float[Array, ""]
    change: Float[Array, " B"]
    gain: Float[Array, " B"]
    residuals: tuple[Float[Array, "B _ D"], ...]
    runs: Int[Array, ""]


class Held(NamedTuple):
    """One branch's part of the cache in a step.

    Attributes:
      reuse: which videos reuse their residual.
      residual: that of the last step that ran the blocks.
    """

    reuse: Bool[Array, " B"]
    residual: Float[Array, "B _ D"]


class Run(NamedTuple):
    """The result of one branch.

    Attributes:
      velocity: float32.
      residual: to be kept.
      change: the relative change of the residual, where the blocks ran.
    """

    velocity: Float[Array, "B F H W C"]
    residual: Float[Array, "B _ D"]
    change: Float[Array, " B"]


def begin(params: Params, dit: DiTConfig, x: Float[Array, "B F H W C"], condition: Condition, branches: int) -> Cache:
    """The cache before the first step, which runs the blocks because nothing is measured yet.

    Args:
      params: of the transformer.
      dit: its configuration.
      x: noise, float32.
      condition: of any branch.
      branches: how many residuals are kept.

    Raises:
      ValueError: the transformer in use is not that of models/dit.py, whose parts the cache runs.
    """
    if transformer.velocity is not velocity:
        raise ValueError("SamplingConfig.cache_threshold is for the transformer of models/dit.py alone; set it to 0.")
    zeros = jnp.zeros(x.shape[0], jnp.float32)
    shape = jax.eval_shape(lambda: embed(params, dit, x, zeros, condition).streams[0])
    residuals = _zeros(shape.shape, shape.dtype, branches)
    return Cache(x, jnp.float32(0), zeros, jnp.full_like(zeros, jnp.inf), residuals, jnp.int32(0))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _zeros(shape: tuple[int, ...], dtype: jnp.dtype, count: int) -> tuple[Array, ...]:
    """Residuals of so many branches, each device's part made on it."""
    return tuple(_place(jnp.zeros(shape, dtype)) for _ in range(count))


def look(
    params: Params, dit: DiTConfig, condition: Condition, before: tuple[Array, Array], now: tuple[Array, Array]
) -> Float[Array, " B"]:
    """The relative change of the time-modulated input between two steps.

    Args:
      params: of the transformer.
      dit: its configuration.
      condition: of any branch; the input of the video tokens depends on none.
      before: latents [B, F, H, W, C] and times [B] of the step before.
      now: those of this step.
    """
    return _relative_change(*(_first_input(params, dit, x, t, condition) for x, t in (now, before)))


def run(params: Params, dit: DiTConfig, x: Array, t: Array, condition: Condition, held: Held) -> Run:
    """The velocity as `dit.velocity` computes it or, where all videos reuse their residuals, without the blocks."""
    inputs = embed(params, dit, x, t, condition)
    before = inputs.streams[0]

    def compute(kept: Array) -> tuple[Array, Array, Array]:
        streams, _ = run_blocks(params["blocks"], dit, inputs, Observer(0, lambda streams, _: None))
        fresh, reuse = streams[0] - before, held.reuse[:, None, None]
        residual = jnp.where(reuse, kept, fresh)
        return jnp.where(reuse, before + kept, streams[0]), residual, _relative_change(fresh, kept)

    def skip(kept: Array) -> tuple[Array, Array, Array]:
        return before + kept, kept, jnp.zeros_like(held.reuse, jnp.float32)

    after, residual, change = jax.lax.cond(jnp.all(held.reuse), skip, compute, held.residual)
    return Run(unembed(params, dit, after, inputs.e, x.shape), _place(residual), change)


def settle(
    cache: Cache, change: Array, reuse: Bool[Array, " B"], measured: Float[Array, " B"], branches: Int[Array, ""]
) -> Cache:
    """The cache after a step, but for its x, t and residuals.

    Args:
      cache: before the step.
      change: a of this step.
      reuse: which videos have reused their residuals.
      measured: the largest relative change of a residual among the branches, where the blocks ran.
      branches: how many branches the step had.
    """
    return cache._replace(
        change=jnp.where(reuse, change, 0),
        gain=jnp.where(reuse, cache.gain, measured / change),
        runs=cache.runs + jnp.where(jnp.all(reuse), 0, branches),
    )


def _first_input(params: Params, dit: DiTConfig, x: Array, t: Array, condition: Condition) -> Float[Array, "B _ D"]:
    """The video tokens as the first block's self-attention is given them, float32."""
    inputs = embed(params, dit, x, t, condition)
    modulation = params["blocks"]["modulation"][0]
    shift, scale, *_ = jnp.split((inputs.shared.time + modulation).astype(jnp.float32), 6, axis=1)
    return modulated_norm(inputs.streams[0], 1 + scale, shift, dit.eps)


def _relative_change(now: Float[Array, "B T D"], before: Float[Array, "B T D"]) -> Float[Array, " B"]:
    """|now - before| / |before| of each video, in float32; padding tokens take part."""
    now, before = now.astype(jnp.float32), before.astype(jnp.float32)
    return jnp.mean(jnp.abs(now - before), (1, 2)) / jnp.mean(jnp.abs(before), (1, 2))


def _place(residual: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Splits a residual over the ambient mesh as the tokens are, which a batch of few videos can't be."""
    even = residual.shape[0] % axis_size(*BATCH[0]) == 0
    return constrain(residual, TOKENS if even else jax.sharding.PartitionSpec(None, SEQUENCE))
