"""Reference alignment: projectors and loss (RefAlign, arXiv 2603.25743, section 3).

With s the projected reference tokens of one block and f the VFM's tokens, both L2-normalised, for one sample:

    pull  L₊ = mean_i max(0, (1 - s_i·f_i) - m₊)
    push  L₋ = mean_(i,j) max(0, m₋ - (1 - s_i·f_j))      over ordered pairs of tokens of different subjects
    L_RA     = mean over blocks of α·L₊ + β·L₋            α = β = 1

The loss is per sample: subjects of other samples never push. Padded references count nowhere, and references that
carry the same subject id are views of one subject and do not repel each other.

Memory: blocks and pairs of references are walked one after the other and recomputed for the gradient, so that no more
than one [B, P, P] matrix of similarities exists; a matrix of all R·P tokens never does.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from refalign_jax.config import AlignmentConfig
from refalign_jax.models.dit import Observer
from refalign_jax.sharding import BATCH, TOKENS, constrain
from refalign_jax.types import Array, Bool, Float, Int, Params


def init_projectors(config: AlignmentConfig, width: int, key: Array) -> dict[str, Any]:
    """Initialises the projectors of all aligned blocks, float32, stacked along a leading axis A.

    Args:
      config: its kind, number and the VFM's width.
      width: D, of the transformer.
      key: random key.

    Returns:
      `mlp`: {"in": [A, D, D/2], "out": [A, D/2, E]}, as published; `conv`: {"kernel": [A, 3, 3, D, E],
      "bias": [A, E]}.
    """
    keys = jax.random.split(key, (2, config.num_blocks))
    if config.projector == "conv":
        kernel_init = nn.initializers.lecun_normal()
        kernel = jax.vmap(lambda k: kernel_init(k, (3, 3, width, config.vfm_width)))(keys[0])
        return {"kernel": kernel, "bias": jnp.zeros((config.num_blocks, config.vfm_width))}
    init = nn.initializers.xavier_uniform()
    return {
        "in": jax.vmap(lambda k: init(k, (width, width // 2)))(keys[0]),
        "out": jax.vmap(lambda k: init(k, (width // 2, config.vfm_width)))(keys[1]),
    }


def project(
    params: Params, tokens: Float[Array, "B T D"], grid: tuple[int, int], config: AlignmentConfig
) -> Float[Array, "B U E"]:
    """Maps the reference tokens of one block to the VFM's width, in float32.

    On a mesh, tokens are gathered over the context after the MLP, where they are E wide and not D.

    Args:
      params: the projector of this block, without the leading axis.
      tokens: of all references of a sample, R·P and what pads them.
      grid: token rows and columns, P = rows·columns; the convolution needs it.
      config: the kind of projector.

    Returns:
      As many tokens as were given by `mlp`; the R·P of whole references by `conv`.
    """
    x = tokens.astype(jnp.float32)
    with jax.default_matmul_precision("highest"):
        if config.projector == "conv":
            B, T, D = x.shape
            whole = T - T % (grid[0] * grid[1])
            x = constrain(x, BATCH)[:, :whole].reshape(-1, *grid, D)
            y = jax.lax.conv_general_dilated(
                x, params["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            return (y + params["bias"]).reshape(B, whole, -1)
        return constrain(jax.nn.silu(constrain(x @ params["in"], TOKENS)) @ params["out"], BATCH)


def normalize_targets(
    targets: Float[Array, "B R P E"], mean_removed: float, eps: float = 1e-6
) -> Float[Array, "B R P E"]:
    """iREPA's spatial normalisation: per reference and channel, (f - γ·mean_P f) / (std_P f + eps)."""
    mean = jnp.mean(targets, axis=2, keepdims=True)
    return (targets - mean_removed * mean) / (jnp.std(targets, axis=2, keepdims=True) + eps)


def pull_push(
    student: Float[Array, "B R P E"],
    teacher: Float[Array, "B R P E"],
    subject_ids: Int[Array, "B R"],
    real: Bool[Array, "B R"],
    config: AlignmentConfig,
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """L₊ and L₋ of one block for each sample.

    Args:
      student: projected reference tokens; normalised here.
      teacher: VFM tokens, as stored; normalised here.
      subject_ids: which subject a reference shows.
      real: False where a reference is padding; its content, any, counts nowhere.
      config: the margins.

    Returns:
      pull and push, 0 where there is no token or no pair to take a mean over.
    """
    R, P = student.shape[1:3]
    shown = real[..., None, None]
    s, f = (_unit(jnp.where(shown, x.astype(jnp.float32), 0)) for x in (student, teacher))

    cosine = jnp.einsum("brpe,brpe->brp", s, f, precision="highest")
    distances = jax.nn.relu(1 - cosine - config.pull_margin) * real[..., None]
    pull = jnp.sum(distances, axis=(1, 2)) / (P * jnp.maximum(jnp.sum(real, axis=1), 1))

    opposed = (subject_ids[:, :, None] != subject_ids[:, None, :]) & real[:, :, None] & real[:, None, :]
    first, second = jnp.nonzero(~jnp.eye(R, dtype=bool), size=R * (R - 1))

    @jax.checkpoint
    def pair(i: Array, j: Array) -> Float[Array, " B"]:
        cosine = jnp.einsum("bpe,bqe->bpq", s[:, i], f[:, j], precision="highest")
        return jnp.sum(jax.nn.relu(config.push_margin - 1 + cosine), axis=(1, 2)) * opposed[:, i, j]

    total, _ = jax.lax.scan(lambda sum_, ij: (sum_ + pair(*ij), None), jnp.zeros(s.shape[0]), (first, second))
    return pull, total / (P * P * jnp.maximum(jnp.sum(opposed, axis=(1, 2)), 1))


class Targets(NamedTuple):
    """What reference tokens are compared with.

    Attributes:
      features: VFM features of the references, normalised over space where configured, 0 where padded, float32.
      subject_ids: which subject a reference shows.
      real: False where a reference is padding.
      grid: token rows and columns of a reference, P = rows·columns.
    """

    features: Float[Array, "B R P E"]
    subject_ids: Int[Array, "B R"]
    real: Bool[Array, "B R"]
    grid: tuple[int, int]


def make_targets(
    features: Float[Array, "B R _ E"],
    subject_ids: Int[Array, "B R"],
    num_references: Int[Array, " B"],
    grid: tuple[int, int],
    config: AlignmentConfig,
) -> Targets:
    """Checks and masks the VFM's tokens, once for all blocks.

    Args:
      features: VFM tokens on the references' grid, as stored.
      subject_ids: which subject a reference shows.
      num_references: references that are real; the others stand behind them and are padding.
      grid: token rows and columns of a reference, P = rows·columns.
      config: width and normalisation of targets.

    Raises:
      ValueError: targets of another width or grid than configured.
    """
    if features.shape[-1] != config.vfm_width:
        raise ValueError(
            f"vfm_features are {features.shape[-1]} wide, AlignmentConfig.vfm_width={config.vfm_width}; set it to the "
            "width of the VFM that made them."
        )
    if features.shape[2] != grid[0] * grid[1]:
        raise ValueError(
            f"vfm_features have {features.shape[2]} tokens a reference, the transformer has {grid[0] * grid[1]} on a "
            f"{grid[0]}x{grid[1]} grid; both must come from the same pixels."
        )
    real = jnp.arange(features.shape[1]) < num_references[:, None]
    features = jnp.where(real[..., None, None], features.astype(jnp.float32), 0)
    if config.normalize_targets:
        features = normalize_targets(features, config.target_mean_removed)
    return Targets(features, subject_ids, real, grid)


def block_terms(
    projector: Params, tokens: Float[Array, "B _ D"], targets: Targets, config: AlignmentConfig
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """L₊ and L₋ of one aligned block for each sample; recomputed for the gradient, so only its inputs are retained.

    Args:
      projector: of this block.
      tokens: reference tokens after it, R·P and the padding behind them, any float dtype.
      targets: what `make_targets` returned.
      config: margins, kind of projector.
    """
    B, R, P, E = targets.features.shape

    @jax.checkpoint
    def terms(projector: Params, tokens: Array, features: Array) -> tuple[Array, Array]:
        student = project(projector, tokens, targets.grid, config)[:, : R * P].reshape(B, R, P, E)
        return pull_push(student, features, targets.subject_ids, targets.real, config)

    with jax.named_scope("alignment"):
        return terms(projector, tokens, targets.features)


def observer(projectors: Params, targets: Targets, config: AlignmentConfig) -> Observer[tuple[Array, Array]]:
    """An observer of the transformer that computes L₊ and L₋ after each aligned block, [A, B] each.

    Args:
      projectors: of all aligned blocks, as `init_projectors` returns them.
      targets: what `make_targets` returned.
      config: margins, kind of projector, number of blocks.
    """
    return Observer(config.num_blocks, lambda streams, p: block_terms(p, streams[1], targets, config), projectors)


def alignment_terms(
    projectors: Params, features: Float[Array, "A B R P D"], targets: Targets, config: AlignmentConfig
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """Means over the aligned blocks of L₊ and of L₋, for each sample, from features that are at hand.

    Training takes the same terms block by block on the way through the transformer, by `observer`.

    Returns:
      pull [B] and push [B], float32, ≥ 0.
    """
    A, B = features.shape[:2]
    flat = features.reshape(A, B, -1, features.shape[-1])
    pull, push = jax.lax.map(lambda xs: block_terms(xs[0], xs[1], targets, config), (projectors, flat))
    return jnp.mean(pull, axis=0), jnp.mean(push, axis=0)


def alignment_loss(pull: Float[Array, " B"], push: Float[Array, " B"], config: AlignmentConfig) -> Float[Array, " B"]:
    """L_RA = α·L₊ + β·L₋ of each sample."""
    return config.pull_weight * pull + config.push_weight * push


def gate(t: Float[Array, " B"], config: AlignmentConfig) -> Float[Array, " B"]:
    """g(t) = (t/1000)^power, t in [0, 1000]: alignment acts at high noise."""
    return (t / 1000) ** config.gate_power


def schedule_weight(step: Int[Array, ""], config: AlignmentConfig) -> Float[Array, ""]:
    """λ at a training step: constant, and 0 from `stop_step` on where that is set (HASTE)."""
    stopped = (step >= config.stop_step) if config.stop_step else False
    return jnp.where(stopped, 0.0, config.weight)


def _unit(x: Float[Array, "... E"]) -> Float[Array, "... E"]:
    """x / max(‖x‖, 1e-12), with a zero gradient at zero."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-24))
