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

from refalign_jax.config import ModelConfig, OptimizerConfig
from refalign_jax.convert.dit import Names
from refalign_jax.convert.files import open_weights
from refalign_jax.convert.table import to_published
from refalign_jax.objective import Batch, Times, terms_at
from refalign_jax.trainer import optimizer
from refalign_jax.types import Params
from refalign_jax.verify.case import Case
from refalign_jax.verify.divergence import gradient_curves
from refalign_jax.verify.floors import SAFETY, Compute, adamw_floor, cancellation_floors, spread
from refalign_jax.verify.report import Floor, Row

ADAMW = OptimizerConfig(learning_rate=5e-5, clip=0.0)
"""The defaults of torch.optim.AdamW, and the recipe's learning rate; no clipping."""


def check_gradients(case: Case, path: Path) -> None:
    """Compares the gradient of every parameter at one index of the training schedule, and finds where it diverges.

    Raises:
      ValueError: the file's name has no index.
    """
    case.need_alignment()
    label = _label(path, r"grads_step(\d*)", "grads_step<index>.safetensors, or grads_step.safetensors")
    compute = gradient_values(case, label, _names(path))
    ours = compute(0)
    floors: dict[str, float] = {}
    pairs: dict[str, tuple[Row, float, float]] = {}
    for name, theirs in _theirs(case, path, ours):

        def floor(name: str = name) -> float:
            if not floors:
                floors.update(gradient_floors(case, label, compute))
            return floors[name]

        row = case.report.compare(f"gradient {name}", ours[name], theirs, "gradient", floor, f"grad/{name}")
        difference, scale = (float(np.sum(np.square(np.float64(x)))) for x in (ours[name] - theirs, theirs))
        pairs[name] = row, difference, scale
    if pairs:
        case.report.curves.append(gradient_curves(path.stem, pairs))


def gradient_values(case: Case, label: str, names: Names) -> Compute:
    """The gradient of one step by its parameters' published names, as a function of the draw (floors.py)."""

    @functools.cache
    def compute(draw: int) -> dict[str, np.ndarray]:
        params, batch, noise = case.moved((case.params, case.batch, case.noise), draw)
        times = case.moved_times(label, draw)
        with case.on_mesh():
            _, gradient = loss_gradient(params, batch, noise, times, config=case.config)
        return dict(to_published(case.table(names), jax.device_get(gradient)))

    return compute


def gradient_floors(case: Case, label: str, compute: Compute) -> dict[str, float]:
    """The noise floor of the gradient of each parameter: moved inputs, cancellation, and the error of the weight w."""
    cancelled = cancellation_floors(compute(0))
    weight, bound = (np.asarray(x[2], np.float64) for x in (case.times(label), case.time_bounds(label)))
    share = float(np.max(bound / np.maximum(weight, bound)))
    return {
        name: spread(compute, name) + cancelled[name] + share * float(np.linalg.norm(g))
        for name, g in compute(0).items()
    }


def check_adamw(case: Case, path: Path) -> None:
    """Compares the change of every parameter over some steps of AdamW, and the loss before each step.

    Raises:
      ValueError: the file's name has no number of steps.
    """
    case.need_alignment()
    steps = int(_label(path, r"weights_after_(\d+)_adamw", "weights_after_<steps>_adamw.safetensors"))
    label = str(case.values.config.optional("adamw_id", 300))
    names = _names(path)
    losses, gradients, after = adamw_steps(case, label, steps, draw=0)
    if "adamw_losses" in case.values.arrays:
        compare_losses(case, label, losses)
    before, ours = (dict(to_published(case.table(names), x)) for x in (case.params, after))
    published: list[dict[str, np.ndarray]] = []
    noise: dict[str, float] = {}

    def floor(name: str) -> float:
        if not noise:
            published.extend(dict(to_published(case.table(names), g)) for g in gradients)
            noise.update(gradient_floors(case, label, gradient_values(case, label, names)))
        series = [step[name] for step in published]
        delta = 3 / SAFETY * noise[name] / max(np.sqrt(before[name].size), 1)
        return adamw_floor(series, float(delta), before[name], ADAMW.learning_rate, ADAMW.eps)

    for name, theirs in _theirs(case, path, ours):
        changes = ours[name] - before[name], theirs - before[name]
        key = f"adamw/{name}"
        case.report.compare(f"update {name}", *changes, "update", functools.partial(floor, name), key)
        case.report.values[key] = ours[name]


def compare_losses(case: Case, label: str, losses: list[float]) -> None:
    """Compares the losses before each step of AdamW."""

    @functools.cache
    def compute(draw: int) -> dict[str, float]:
        found = adamw_steps(case, label, len(losses), draw)[0] if draw else losses
        return {f"step {i}": x for i, x in enumerate(found)}

    weight, bound = (float(np.mean(x[2])) for x in (case.times(label), case.time_bounds(label)))

    def floor(name: str) -> float:
        return spread(compute, name) + bound / max(weight, bound) * compute(0)[name]

    errors: dict[str, Floor] = {name: functools.partial(floor, name) for name in compute(0)}
    case.report.compare_each("adamw_losses", losses, case.values.arrays["adamw_losses"], list(compute(0)), errors)


def adamw_steps(case: Case, label: str, steps: int, draw: int) -> tuple[list[float], list[Params], Params]:
    """Takes steps of AdamW: the loss and the gradient before each, and the parameters after the last."""
    params, batch, noise = case.moved((case.params, case.batch, case.noise), draw)
    times = case.moved_times(label, draw)
    state, losses, gradients = optimizer.init_optimizer(params, ADAMW), [], []
    for _ in range(steps):
        with case.on_mesh():
            loss, gradient = loss_gradient(params, batch, noise, times, config=case.config)
            params, state = update(params, state, gradient)
        losses.append(float(loss))
        gradients.append(jax.device_get(gradient))
    return losses, gradients, jax.device_get(params)


@functools.partial(jax.jit, static_argnames="config")
def loss_gradient(params: Params, batch: Batch, noise: jax.Array, times: Times, *, config: ModelConfig) -> Any:
    """The mean loss of a batch and its gradient."""

    def loss(params: Params) -> jax.Array:
        return jnp.mean(terms_at(params, batch, noise, times, jnp.int32(0), config)[0].loss)

    return jax.value_and_grad(loss)(params)


@jax.jit
def update(params: Params, state: Any, gradient: Params) -> Any:
    """Parameters and optimizer state after one step of the trainer's AdamW."""
    return optimizer.update(gradient, state, params, jnp.float32(ADAMW.learning_rate), ADAMW)


def _label(path: Path, pattern: str, form: str) -> str:
    """What a file's name says beside its kind."""
    match = re.fullmatch(pattern, path.stem)
    if match is None:
        raise ValueError(f"{path} must be named {form}.")
    return match[1]


def _names(path: Path) -> Names:
    """Whose names the tensors of a weight file have."""
    shapes = open_weights(path).shapes
    return "diffusers" if any(name.startswith("condition_embedder.") for name in shapes) else "wan"


def _theirs(case: Case, path: Path, ours: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields name and value of each tensor of a weight file that is ours too; remarks on the others."""
    weights = open_weights(path)
    for name in ours:
        if name in weights.shapes:
            yield name, np.asarray(weights.read(name), np.float32)
    lacking = [name for name in ours if name not in weights.shapes]
    extra = [name for name in weights.shapes if name not in ours]
    for what, names in (("lacks", lacking), ("holds, beside the model's parameters,", extra)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            case.report.remarks.append(f"{path.name} {what} {', '.join(names[:3])}{more}.")
