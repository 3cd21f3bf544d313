"""The parameters that a fresh run starts from: random, another run's, or published ones."""

from __future__ import annotations

from typing import Any

import jax

from refalign_jax.alignment import init_projectors
from refalign_jax.config import ModelConfig
from refalign_jax.models.transformer import init_params
from refalign_jax.types import Array


def random_params(model: ModelConfig, key: Array) -> dict[str, Any]:
    """All parameters of a model at random, float32; without projectors where the alignment weight is 0."""
    params = init_model(model, key)
    if not model.alignment.weight:
        del params["projectors"]
    return params


def init_model(config: ModelConfig, key: Array) -> dict[str, Any]:
    """Initialises transformer and projectors, float32; jit-able, so that they can be born sharded."""
    dit_key, projector_key = jax.random.split(key)
    return {
        "dit": init_params(config.dit, dit_key),
        "projectors": init_projectors(config.alignment, config.dit.width, projector_key),
    }


def model_shapes(config: ModelConfig) -> dict[str, Any]:
    """Shapes and dtypes of `init_model`'s parameters, without making them."""
    return jax.eval_shape(lambda: init_model(config, jax.random.key(0)))
