"""The stages of sampling around the transformer, to be compiled: text encoder and VAE decoder.

The networks are in memory one after another, so that sampling needs the memory of its largest stage. Each is as the
sampler runs it: parameters whole on every device, the batch split over the devices.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from refalign_jax.config import Config, QuantisedDType
from refalign_jax.models import umt5, vae
from refalign_jax.models.quantise import quantise_shapes
from refalign_jax.sharding import BATCH, replicated
from refalign_jax.types import Params

Stage = Literal["text", "decode"]


def stage_params(config: Config, stage: Stage) -> tuple[umt5.UMT5Config | vae.VAEConfig, Params]:
    """The network of a stage, UMT5-XXL or Wan2.1's VAE, and the shapes of its parameters as they are published."""
    dit, key = config.model.dit, jax.eval_shape(lambda: jax.random.key(0))
    if stage == "text":
        text = umt5.UMT5Config(width=dit.text_width, compute_dtype=dit.compute_dtype)
        return text, _cast(jax.eval_shape(lambda key: umt5.init(text, key), key), jnp.bfloat16)
    video = vae.VAEConfig(compute_dtype=dit.compute_dtype)
    return video, {"decoder": jax.eval_shape(lambda key: vae.init(video, key), key)["decoder"]}


def lower_stage(
    config: Config, mesh: Mesh, stage: Stage, quantised: QuantisedDType | None = None
) -> jax.stages.Lowered:
    """Lowers the encoding of a batch of prompts, or the decoding of a batch of videos.

    Args:
      config: the recipe; text width and length, latent grid and compute dtype are used.
      mesh: the devices.
      stage: which.
      quantised: dtype of the text encoder's quantised weights; None for those published.
    """
    data, split = config.data, NamedSharding(mesh, BATCH)
    network, shapes = stage_params(config, stage)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)), shapes)
    if isinstance(network, umt5.UMT5Config):
        params = quantise_shapes(params, quantised) if quantised else params
        ids = jax.ShapeDtypeStruct((data.batch_size, data.text_length), jnp.int32, sharding=split)
        return umt5.encode.lower(params, ids, ids, network)
    size = (data.batch_size, *config.synthetic.latent_grid, network.latent_channels)
    latents = jax.ShapeDtypeStruct(size, jnp.float32, sharding=split)
    return jax.jit(vae.decode, static_argnames="config").lower(params, latents, config=network)


def _cast(shapes: Params, dtype: Any) -> Params:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes)
