"""Noise floors: how far two correct float32 computations of one value can be apart.

A float32 result is the exact result of inputs that differ from the given ones by a few roundings (Wilkinson's backward
error), so what a value does when its inputs are rounded differently bounds how well anyone can know it. Four models:

    moved inputs   parameters and inputs moved by one spacing or not at all, at random, three times; SAFETY times the
                   largest change of the value
    angles         t moved by one spacing: a float32 angle t·frequency is not known better
    cancellation   a gradient that is zero in exact arithmetic: SAFETY roundings of its operation's largest gradient
    tables         the training schedule in float32, rounding by rounding, for each entry

AdamW divides a gradient by its own size, so an element whose gradient is hardly above its floor moves by any amount up
to the learning rate; `adamw_floor` follows each element. A floor is computed only for a value beyond its tolerance.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from refalign_jax.flow import Schedule, schedule
from refalign_jax.objective import Times
from refalign_jax.types import Array

UNIT = 2.0**-24
"""Largest relative error of one rounding to float32."""

SAFETY = 10.0
"""Factor between a measured change and the floor; two frameworks round many more operations than the inputs."""

DRAWS = (1, 2, 3)
"""Numbers of the computations with moved inputs; 0 is the computation as it is."""

ANGLES = -1
"""Number of the computation with moved t."""

ALL_DRAWS = (*DRAWS, ANGLES)

Compute = Callable[[int], Mapping[str, Any]]
"""Maps a draw to values by name, moved where the draw is not 0."""


def moved(tree: Any, draw: int, spacing: float) -> Any:
    """Moves every float of a tree up or down by one spacing, or not at all, at random.

    Args:
      tree: arrays; those of whole numbers stay.
      draw: number of the computation; 0 and `ANGLES` move nothing.
      spacing: relative distance of neighbouring numbers, 2^-23 in float32.
    """
    return _moved(tree, jax.random.key(draw), spacing) if draw in DRAWS else tree


@functools.partial(jax.jit, static_argnums=2)
def _moved(tree: Any, key: Array, spacing: float) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, max(len(leaves), 1))

    def move(x: Array, key: Array) -> Array:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        return x * (1 + spacing * jax.random.randint(key, x.shape, -1, 2)).astype(x.dtype)

    return jax.tree.unflatten(structure, [move(x, key) for x, key in zip(leaves, keys, strict=True)])


def spread(compute: Compute, name: str) -> float:
    """The floor of the norm of one value, by moved inputs and by angles."""
    ours = np.asarray(compute(0)[name], np.float64)
    changes = {draw: float(np.linalg.norm(np.asarray(compute(draw)[name], np.float64) - ours)) for draw in ALL_DRAWS}
    return SAFETY * max(changes[draw] for draw in DRAWS) + changes[ANGLES]


def table_bounds(num_steps: int, shift: float) -> Schedule:
    """How far each entry of `flow.schedule` may be from a table that was computed in float32, absolute, float64.

    σ = linspace(1, 0) has an error of up to two roundings of 1, whatever its size, so that small σ are known to few
    digits. Each further operation adds a rounding of its result, and every function passes its argument's error on.
    The weights subtract their minimum, so that near it only the rounding of 1 is left.
    """
    uniform = np.linspace(1, 0, num_steps + 1, dtype=np.float64)[:-1]
    table = schedule(num_steps, shift)
    sigmas, t = np.asarray(table.sigmas, np.float64), np.asarray(table.timesteps, np.float64)
    error = 4 * UNIT * shift / np.square(1 + (shift - 1) * uniform) + 4 * UNIT * sigmas
    times = 1000 * error + 2 * UNIT * t
    bell = np.exp(-2 * np.square((t - 500) / 1000))
    total = np.sum(bell - bell.min())
    bells = 4 * np.abs(t - 500) / 1e6 * bell * times + 8 * UNIT * bell
    weights = num_steps / max(total, UNIT) * (bells + bells[bell.argmin()]) + 64 * UNIT * table.weights
    return Schedule(error, times, weights)


def moved_times(times: Times, bounds: Times, draw: int) -> Times:
    """σ and t of each sample moved up or down by the error of a float32 table, where the draw moves inputs; w stays."""
    if draw not in DRAWS:
        return times
    signs = np.random.default_rng(draw).choice((-1.0, 1.0), size=(2, len(times[0])))
    sigma, t = (
        jnp.asarray(x + sign * bound, jnp.float32) for x, bound, sign in zip(times, bounds, signs, strict=False)
    )
    return sigma, jnp.clip(t, 0, 1000), times[2]


def moved_time(t: Array, draw: int, spacing: float) -> Array:
    """T moved by one spacing, where the draw is `ANGLES`."""
    return jnp.asarray(t * (1 - spacing), jnp.float32) if draw == ANGLES else t


def operation(name: str) -> str:
    """The operation to which a tensor belongs, by its published name: `blocks.3.attention`, `head` and so on."""
    match = re.match(r"blocks\.(\d+)\.(\w+)", name)
    if match is None:
        return "head" if name.startswith(("head", "proj_out", "scale_shift_table")) else "embedding"
    kinds = {
        "attention": ("self_attn", "attn1"),
        "cross_attention": ("cross_attn", "attn2", "norm3", "norm2"),
        "ffn": ("ffn",),
        "projector": ("input_mlp", "input_conv"),
    }
    kind = next((kind for kind, names in kinds.items() if match[2] in names), "modulation")
    return f"blocks.{match[1]}.{kind}"


def cancellation_floors(gradient: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The floor by cancellation of the norm of each parameter's gradient.

    Where terms cancel, what is left of them is their rounding. The terms are as large as the other gradients of the
    same operation, by root mean square.
    """
    largest: dict[str, float] = {}
    for name, g in gradient.items():
        size = float(np.sqrt(np.mean(np.square(g, dtype=np.float64)))) if g.size else 0.0
        largest[operation(name)] = max(largest.get(operation(name), 0.0), size)
    return {name: SAFETY * UNIT * largest[operation(name)] * float(np.sqrt(g.size)) for name, g in gradient.items()}


def adamw_floor(
    gradients: Sequence[np.ndarray], noise: float, weights: np.ndarray, learning_rate: float, eps: float
) -> float:
    """The floor of the norm of a tensor's update over several steps of AdamW.

    A step moves an element by up to η·g/(|g| + ε). Where g is known to δ, that is known to η·δ/(|g| + ε), and to 2η at
    the most. Beside that, each step rounds the weight twice.

    Args:
      gradients: of the tensor, one for each step.
      noise: δ, root mean square over the tensor; three times what was measured.
      weights: of the tensor, before the steps.
      learning_rate: η.
      eps: ε.
    """
    size = np.abs(np.asarray(weights, np.float64))
    total = np.zeros(size.shape)
    for g in gradients:
        total += learning_rate * np.minimum(2, 2 * noise / (np.abs(np.asarray(g, np.float64)) + eps))
    total += np.sqrt(2 * len(gradients)) * UNIT * size  # roundings of both signs, a random walk
    return float(np.linalg.norm(total.ravel()))
