"""Sampling: Euler steps along the guided velocity.

    x ← x + (σ_{i+1} - σ_i)·v,   σ_N = 0
    v = v(n,0) + s_ref·(v(n,r) - v(n,0)) + s_text·(v(c,r) - v(n,r))

n is the negative prompt, c the prompt, r the references; 0 means as many frames of zero latents, with their tokens and
positions. References stay clean through every step. Nothing of the alignment takes part: the transformer alone runs.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from refalign_jax.config import DiTConfig, SamplingConfig
from refalign_jax.flow import schedule
from refalign_jax.models.dit import DiT
from refalign_jax.types import Array, Float, Int, Params


def guided_velocity(
    params: Params,
    x: Float[Array, "B F H W C"],
    t: Float[Array, " B"],
    text: Float[Array, "B S text_width"],
    negative_text: Float[Array, "B S text_width"],
    reference_latents: Float[Array, "B R H W C"] | None,
    num_references: Int[Array, " B"] | None,
    dit: DiTConfig,
    config: SamplingConfig,
) -> Float[Array, "B F H W C"]:
    """The guided velocity of the module's docstring; without references, v(n) + s_text·(v(c) - v(n)).

    Arguments as in `sample`; t in [0, 1000].
    """

    def velocity(text: Array, references: Array | None) -> Array:
        repeats = text.shape[0] // x.shape[0]
        counts = None if num_references is None else jnp.tile(num_references, repeats)
        latents = jnp.tile(x, (repeats, 1, 1, 1, 1))
        outputs: Any = DiT(dit).apply({"params": params}, latents, jnp.tile(t, repeats), text, references, counts)
        return outputs[0]

    if reference_latents is None:
        branches: list[tuple[Array, Array | None]] = [(negative_text, None), (text, None)]
        scales: tuple[float, ...] = (config.text_guidance,)
    else:
        branches = [
            (negative_text, jnp.zeros_like(reference_latents)),
            (negative_text, reference_latents),
            (text, reference_latents),
        ]
        scales = (config.reference_guidance, config.text_guidance)

    if config.batched_guidance:
        texts, references = zip(*branches, strict=True)
        joined = None if reference_latents is None else jnp.concatenate(references)
        velocities = jnp.split(velocity(jnp.concatenate(texts), joined), len(branches))
    else:
        velocities = [velocity(*branch) for branch in branches]
    guided = velocities[0]
    for scale, before, after in zip(scales, velocities, velocities[1:], strict=False):
        guided = guided + scale * (after - before)
    return guided


@functools.partial(jax.jit, static_argnames=("dit", "config"))
def sample(
    params: Params,
    noise: Float[Array, "B F H W C"],
    text: Float[Array, "B S text_width"],
    negative_text: Float[Array, "B S text_width"],
    reference_latents: Float[Array, "B R H W C"] | None = None,
    num_references: Int[Array, " B"] | None = None,
    *,
    dit: DiTConfig,
    config: SamplingConfig,
) -> Float[Array, "B F H W C"]:
    """Draws videos; one compiled program holds the whole loop.

    Args:
      params: of the transformer alone.
      noise: standard normal, float32; its shape is the video's.
      text: embeddings of the prompt, padding rows zero.
      negative_text: embeddings of the negative prompt.
      reference_latents: clean, normalised; None for plain text-to-video.
      num_references: references of each sample that are real; None, all.
      dit: the transformer.
      config: steps, shift, guidance.

    Returns:
      Normalised latents, float32.
    """
    table = schedule(config.num_steps, config.shift)
    sigmas = jnp.append(jnp.asarray(table.sigmas), 0.0)

    def step(x: Array, inputs: tuple[Array, Array, Array]) -> tuple[Array, None]:
        sigma, following, t = inputs
        velocity = guided_velocity(
            params, x, jnp.full(x.shape[:1], t), text, negative_text, reference_latents, num_references, dit, config
        )
        return x + (following - sigma) * velocity, None

    inputs = (sigmas[:-1], sigmas[1:], jnp.asarray(table.timesteps))
    return jax.lax.scan(step, noise.astype(jnp.float32), inputs)[0]
