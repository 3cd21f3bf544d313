"""The parameters that a fresh run or a sampler starts from: random, those of a checkpoint, or published ones."""

from __future__ import annotations

import contextlib
from typing import Any

import jax
import numpy as np

from refalign_jax.config import ModelConfig
from refalign_jax.convert.checkpoint import find_checkpoint, restore_params
from refalign_jax.convert.dit import model_table
from refalign_jax.convert.files import holds_weights
from refalign_jax.convert.forms import View
from refalign_jax.convert.infer import open_transformer
from refalign_jax.convert.table import Stored, stored
from refalign_jax.initial import random_params
from refalign_jax.trees import flatten, unflatten
from refalign_jax.types import Array, Params


def initial_params(
    init: str, ema: bool, model: ModelConfig, shapes: Params, key: Array, verify: bool = True
) -> tuple[dict[str, Any], str]:
    """Parameters straight in their place on the devices, float32.

    Args:
      init: a checkpoint, a run's folder, published weights, or empty for random parameters.
      ema: take the moving average of `init`.
      model: what they must fit.
      shapes: `jax.ShapeDtypeStruct`s with shardings.
      key: for what is random.
      verify: compare the files of a checkpoint with their digests first.

    Returns:
      The parameters, and a sentence that states where they are from. Projectors that `init` lacks are random.

    Raises:
      ValueError: `init` is none of these, or holds another model: names and shapes are listed.
    """
    shardings = jax.tree.map(lambda x: x.sharding, shapes)
    if not init:
        params = jax.jit(lambda key: random_params(model, key), out_shardings=shardings)(key)
        return params, "Parameters are random."
    if is_checkpoint(init):
        params = restore_params(init, shapes, ema, verify)
    elif ema:
        raise ValueError(f"train.init_ema: {init} is no training checkpoint, so it has no moving average.")
    else:
        params = _published(init, model, shapes)
    origin = f"Parameters are from {init}{', its moving average' if ema else ''}."
    if "projectors" in shapes and "projectors" not in params:
        fresh = jax.jit(lambda key: random_params(model, key)["projectors"], out_shardings=shardings["projectors"])
        params["projectors"] = fresh(key)
        origin += " It has no projectors; those are random."
    return params, origin


def is_checkpoint(path: str) -> bool:
    """Whether this is a checkpoint or a run's folder, and not published weights; so is what is neither."""
    with contextlib.suppress(ValueError):
        return bool(find_checkpoint(path))
    return not holds_weights(path)


def find_published(weights: str, model: ModelConfig, shapes: Params) -> dict[str, Any]:
    """Finds the parameters of a model in published weights, each a `Stored`, without reading them.

    Raises:
      ValueError: as `initial_params`.
    """
    opened = open_transformer(weights, model.dit.num_heads)
    tensors, has_projectors = opened.tensors, opened.has_projectors
    for name in opened.stated & {"eps", "rope_theta"}:
        found, ours = (getattr(config.dit, name) for config in (opened.config, model))
        if found != ours:
            raise ValueError(f"{tensors.source} is a model with {name}={found}, and model.dit.{name} is {ours}.")
    if "projectors" not in shapes:  # a model without alignment has no use for them
        has_projectors = False
        tensors = View(tensors, {name: name for name in tensors.shapes if ".input_" not in name})
    wanted = dict(shapes) if has_projectors else {"dit": shapes["dit"]}
    table = model_table(model.dit, model.alignment if has_projectors else None, opened.names)
    return stored(table, wanted, tensors)  # type: ignore[return-value]


def _published(weights: str, model: ModelConfig, shapes: Params) -> dict[str, Any]:
    """Reads published weights, each process only what its devices hold; refuses those of another model."""
    found, wanted = flatten(find_published(weights, model, shapes)), flatten(shapes)
    return unflatten({path: _place(wanted[path], leaf) for path, leaf in found.items()})


def _place(target: jax.ShapeDtypeStruct, leaf: Stored) -> Array:
    """Reads one parameter onto the devices, block by block; waits until it is there, so that the host holds one."""
    array = jax.make_array_from_callback(
        target.shape, target.sharding, lambda index: np.asarray(leaf[index or ()], target.dtype)
    )
    return array.block_until_ready()
