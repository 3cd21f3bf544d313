"""Comparisons of gradients, and of weights after steps of AdamW."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from refalign_jax.config import ModelConfig
from refalign_jax.convert.files import open_weights
from refalign_jax.convert.table import to_published
from refalign_jax.objective import Batch, objective
from refalign_jax.types import Params
from refalign_jax.verify.case import Case

ADAMW = {"learning_rate": 5e-5, "b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.01}
"""The defaults of torch.optim.AdamW, and the recipe's learning rate."""


def check_gradients(case: Case, path: Path) -> None:
    """Compares the gradient of every parameter at one index of the training schedule.

    Raises:
      ValueError: the file's name has no index.
    """
    index = _number(path, r"grads_step(\d+)", "grads_step<index>.safetensors")
    _, gradient = loss_gradient(case.params, case.batch, case.noise, case.indices(index), config=case.config)
    for name, ours, theirs in _pairs(case, path, gradient):
        case.report.compare(f"gradient {name}", ours, theirs, "gradient", key=f"grad/{name}")


def check_adamw(case: Case, path: Path) -> None:
    """Compares the change of every parameter over some steps of AdamW, and the loss before each step.

    Raises:
      ValueError: the file's name has no number of steps.
    """
    num_steps = _number(path, r"weights_after_(\d+)_adamw", "weights_after_<steps>_adamw.safetensors")
    indices = case.indices(int(case.values.config.get("adamw_id", 300)))
    params: Params = jax.tree.map(jnp.asarray, case.params)
    state, losses = optax.adamw(**ADAMW).init(params), []
    for _ in range(num_steps):
        loss, gradient = loss_gradient(params, case.batch, case.noise, indices, config=case.config)
        losses.append(float(loss))
        params, state = update(params, state, gradient)
    if "adamw_losses" in case.values.arrays:
        labels = [f"step {i}" for i in range(num_steps)]
        case.report.compare_each("adamw_losses", losses, case.values.arrays["adamw_losses"], labels)
    before: Mapping[str, np.ndarray] = dict(to_published(case.table, case.params))
    for name, ours, theirs in _pairs(case, path, params):
        changes = (ours - before[name], theirs - before[name])
        case.report.compare(f"update {name}", *changes, "update", key=f"adamw/{name}")
        case.report.values[f"adamw/{name}"] = changes[0] + before[name]


@functools.partial(jax.jit, static_argnames="config")
def loss_gradient(params: Params, batch: Batch, noise: jax.Array, index: jax.Array, *, config: ModelConfig) -> Any:
    """The mean loss of a batch and its gradient."""

    def loss(params: Params) -> jax.Array:
        return objective(params, batch, noise, index, jnp.int32(0), config)[0]

    return jax.value_and_grad(loss)(params)


@jax.jit
def update(params: Params, state: Any, gradient: Params) -> Any:
    """Parameters and optimizer state after one step of AdamW."""
    optimizer = optax.adamw(**ADAMW)
    updates, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, updates), state


def _number(path: Path, pattern: str, form: str) -> int:
    match = re.fullmatch(pattern, path.stem)
    if match is None:
        raise ValueError(f"{path} must be named {form}.")
    return int(match[1])


def _pairs(case: Case, path: Path, tree: Params) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yields the published name, ours and theirs of each tensor of a weight file; remarks on those that it lacks."""
    weights = open_weights(path)
    for name, ours in to_published(case.table, jax.device_get(tree)):
        if name in weights.shapes:
            yield name, ours, weights.read(name)
        else:
            case.report.remarks.append(f"{path.name} lacks {name}.")
