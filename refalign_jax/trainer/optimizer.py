"""AdamW with decoupled weight decay, its learning-rate schedule, frozen parameters and the moving average.

    m ← β₁m + (1-β₁)g,  v ← β₂v + (1-β₂)g²          g clipped to a global norm
    θ ← θ - η(k)·(m̂/(√v̂ + ε) + λθ)                  m̂, v̂ corrected for their start at 0
    θ̄ ← d·θ̄ + (1-d)·θ

η depends on the training step k and not on the number of updates, so a skipped batch doesn't shift the schedule.
The loss is not differentiated with respect to frozen parameters, so they need neither a gradient nor moments.
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
    peak, warmup = config.learning_rate, config.warmup_steps
    schedule = optax.schedules.constant_schedule(peak)
    if config.schedule == "cosine":
        schedule = optax.schedules.cosine_decay_schedule(peak, num_steps - warmup, alpha=config.final_share)
    if warmup:
        rise = optax.schedules.linear_schedule(peak / warmup, peak, warmup - 1)
        schedule = optax.schedules.join_schedules([rise, schedule], [warmup])
    return jnp.asarray(schedule(step), jnp.float32)


def transformation(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clipping and AdamW up to the factor -η, which `update` applies."""
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
    return optax.incremental_update(params, average, step_size=1 - decay)


def split(params: Params, freeze: tuple[str, ...]) -> tuple[Params, Params]:
    """Splits parameters into the trained and the frozen; `merge` is the inverse.

    Args:
      params: a nested dict of arrays or shapes.
      freeze: patterns of paths such as `dit/blocks/ffn/in/kernel`; `*` spans slashes.

    Raises:
      ValueError: a pattern matches no parameter, or nothing is left to train.
    """
    flat = flatten(params)
    frozen: dict[str, Any] = {}
    for pattern in freeze:
        matched = fnmatch.filter(flat, pattern)
        if not matched:
            raise ValueError(
                f"optimizer.freeze: no parameter is called {pattern!r}; names look like {next(iter(flat))!r} and "
                f"{list(flat)[-1]!r}, and * matches anything."
            )
        frozen |= {path: flat[path] for path in matched}
    if len(frozen) == len(flat):
        raise ValueError(f"optimizer.freeze={freeze} freezes every parameter; leave something to train.")
    return unflatten({path: x for path, x in flat.items() if path not in frozen}), unflatten(frozen)


def merge(first: Params, second: Params) -> dict[str, Any]:
    """Joins the two parts that `split` made."""
    return unflatten({**flatten(first), **flatten(second)})
