"""AdamW with decoupled weight decay, its schedule, frozen parameters and the moving average.

    m ← β₁m + (1-β₁)g,  v ← β₂v + (1-β₂)g²          g clipped to a global norm
    θ ← θ - η(k)·(m̂/(√v̂ + ε) + λθ)                  m̂, v̂ corrected for their start at 0
    θ̄ ← d·θ̄ + (1-d)·θ

η depends on the training step k and not on the number of updates, so a skipped batch doesn't shift the schedule.
Frozen parameters are no part of what is differentiated: they cost neither a gradient nor moments.
"""

from __future__ import annotations

import fnmatch
from typing import Any

import jax
import jax.numpy as jnp
import optax

from refalign_jax.config import OptimizerConfig
from refalign_jax.trees import flatten, unflatten
from refalign_jax.types import Array, Float, Int, Params


def learning_rate(step: Int[Array, ""], config: OptimizerConfig, num_steps: int) -> Float[Array, ""]:
    """η at a step in [0, num_steps).

    Warm-up takes the steps [0, w) at η·(step + 1)/w; a cosine runs from step w to `num_steps`.
    """
    step = jnp.asarray(step, jnp.float32)
    warm = jnp.minimum(1.0, (step + 1) / max(config.warmup_steps, 1))
    share = jnp.float32(1)
    if config.schedule == "cosine":
        done = jnp.clip((step - config.warmup_steps) / (num_steps - config.warmup_steps), 0, 1)
        share = config.final_share + (1 - config.final_share) * 0.5 * (1 + jnp.cos(jnp.pi * done))
    return config.learning_rate * warm * share


def transformation(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clip and AdamW up to the factor -η, which `update` applies."""
    clip = [optax.clip_by_global_norm(config.clip)] if config.clip else []
    return optax.chain(
        *clip,
        optax.scale_by_adam(config.beta1, config.beta2, config.eps),
        optax.add_decayed_weights(config.weight_decay),
    )


def init_optimizer(params: Params, config: OptimizerConfig) -> Any:
    """The optimizer's state for the trained part of `params`."""
    return transformation(config).init(split(params, config.freeze)[0])


def update(
    gradients: Params, state: Any, params: Params, rate: Float[Array, ""], config: OptimizerConfig
) -> tuple[Params, Any]:
    """One AdamW step.

    Args:
      gradients: of the trained parameters.
      state: what `init_optimizer` or this function returned.
      params: the trained parameters.
      rate: η.
      config: betas, eps, weight decay, clip.

    Returns:
      The trained parameters and the state after the step.
    """
    directions, state = transformation(config).update(gradients, state, params)
    return jax.tree.map(lambda x, d: x - rate * d, params, directions), state


def moving_average(average: Params, params: Params, decay: float) -> Params:
    """d·θ̄ + (1-d)·θ."""
    return jax.tree.map(lambda a, x: decay * a + (1 - decay) * x, average, params)


def split(params: Params, freeze: tuple[str, ...]) -> tuple[Params, Params]:
    """Parts parameters into the trained and the frozen; `merge` undoes it.

    Args:
      params: a nested dict of arrays or shapes.
      freeze: patterns of paths such as `dit/blocks/ffn/in/kernel`; `*` spans slashes.

    Raises:
      ValueError: a pattern that no parameter has, or nothing left to train.
    """
    flat = flatten(params)
    frozen: dict[str, Any] = {}
    for pattern in freeze:
        matched = fnmatch.filter(flat, pattern)
        if not matched:
            raise ValueError(
                f"optimizer.freeze: no parameter is called {pattern!r}; they are called as {next(iter(flat))!r} and "
                f"{list(flat)[-1]!r}, and * stands for anything."
            )
        frozen |= {path: flat[path] for path in matched}
    if len(frozen) == len(flat):
        raise ValueError(f"optimizer.freeze={freeze} freezes every parameter; leave something to train.")
    return unflatten({path: x for path, x in flat.items() if path not in frozen}), unflatten(frozen)


def merge(first: Params, second: Params) -> dict[str, Any]:
    """Joins the two parts that `split` made."""
    return unflatten({**flatten(first), **flatten(second)})
