"""Initial parameters of a model: the transformer and the projectors of the alignment loss."""

from __future__ import annotations

from typing import Any

import jax

from refalign_jax.alignment import init_projectors
from refalign_jax.config import ModelConfig
from refalign_jax.models.transformer import init_params
from refalign_jax.types import Array


def random_params(model: ModelConfig, key: Array) -> dict[str, Any]:
    """Initialises the parameters that a model trains, float32: no projectors if the alignment weight is 0."""
    params = init_model(model, key)
    if not model.alignment.weight:
        del params["projectors"]
    return params


def init_model(config: ModelConfig, key: Array) -> dict[str, Any]:
    """Initialises transformer and projectors, float32; under `jax.jit` with `out_shardings`, directly on a mesh."""
    dit_key, projector_key = jax.random.split(key)
    return {
        "dit": init_params(config.dit, dit_key),
        "projectors": init_projectors(config.alignment, config.dit.width, projector_key),
    }


def model_shapes(config: ModelConfig) -> dict[str, Any]:
    """Shapes and dtypes of the parameters that `init_model` returns, computed without creating them."""
    return jax.eval_shape(lambda: init_model(config, jax.random.key(0)))
