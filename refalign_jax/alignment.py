"""Reference alignment: projectors and loss (RefAlign, arXiv 2603.25743, section 3).

With s the projected reference tokens of one block and f the VFM's tokens, both L2-normalised, for one sample:

    pull  L₊ = mean_i max(0, (1 - s_i·f_i) - m₊)
    push  L₋ = mean_(i,j) max(0, m₋ - (1 - s_i·f_j))      over ordered pairs of tokens of different subjects
    L_RA     = mean over blocks of α·L₊ + β·L₋            α = β = 1

The loss is per sample: subjects of other samples never push. Padded references count nowhere, and references that
carry the same subject id are views of one subject and do not repel each other.

As published, pull and push contradict each other: targets of different subjects have positive cosines, because all
tokens share a mean and white patches look alike, so a student that equals its targets is still pushed away from them.
`remaining_push` measures this. Two options of `AlignmentConfig`, off by default, reduce it: `center_targets` subtracts
a mean from f before it is normalised, and `subject_patches_only` takes the means over tokens that show a subject.

Memory: blocks and pairs of references are walked one after the other and recomputed for the gradient, so that no more
than one [B, P, P] matrix of similarities exists; a matrix of all R·P tokens never does.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from refalign_jax.config import AlignmentConfig
from refalign_jax.models.dit import OBSERVED, Observer
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
    subject_mask: Bool[Array, "B R P"] | None = None,
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """L₊ and L₋ of one block for each sample.

    Args:
      student: projected reference tokens; normalised here.
      teacher: VFM tokens, as stored; normalised here.
      subject_ids: which subject a reference shows.
      real: False where a reference is padding; its content, any, counts nowhere.
      config: the margins.
      subject_mask: True where a token counts; None for all tokens of real references.

    Returns:
      pull and push, 0 where there is no token or no pair to take a mean over.
    """
    R, P = student.shape[1:3]
    shown = real[..., None, None]
    s, f = (_unit(jnp.where(shown, x.astype(jnp.float32), 0)) for x in (student, teacher))

    counted = real[..., None] if subject_mask is None else real[..., None] & subject_mask
    sizes = P * real.astype(jnp.int32) if subject_mask is None else jnp.sum(counted, axis=2)  # tokens, [B, R]
    cosine = jnp.einsum("brpe,brpe->brp", s, f, precision="highest")
    distances = jax.nn.relu(1 - cosine - config.pull_margin) * counted
    pull = jnp.sum(distances, axis=(1, 2)) / jnp.maximum(jnp.sum(sizes, axis=1), 1)

    opposed = (subject_ids[:, :, None] != subject_ids[:, None, :]) & real[:, :, None] & real[:, None, :]
    first, second = jnp.nonzero(~jnp.eye(R, dtype=bool), size=R * (R - 1))

    @jax.checkpoint
    def pair(i: Array, j: Array) -> Float[Array, " B"]:
        cosine = jnp.einsum("bpe,bqe->bpq", s[:, i], f[:, j], precision="highest")
        excess = jax.nn.relu(config.push_margin - 1 + cosine)
        if subject_mask is not None:
            excess = excess * counted[:, i, :, None] * counted[:, j, None, :]
        return jnp.sum(excess, axis=(1, 2)) * opposed[:, i, j]

    total, _ = jax.lax.scan(lambda sum_, ij: (sum_ + pair(*ij), None), jnp.zeros(s.shape[0]), (first, second))
    pairs = jnp.sum(opposed * (sizes[:, :, None] * sizes[:, None, :]).astype(jnp.float32), axis=(1, 2))
    return pull, total / jnp.maximum(pairs, 1)


class SubjectPatches(NamedTuple):
    """Which VFM tokens show a subject.

    Attributes:
      mask: True where the patch shows the subject, False where it is blank.
      mean: of the tokens that show a subject, over the dataset of each sample; `center_targets="dataset"` alone needs
        it.
    """

    mask: Bool[Array, "B R P"]
    mean: Float[Array, "B E"] | None = None


class Targets(NamedTuple):
    """What reference tokens are compared with.

    Attributes:
      features: VFM features of the references, centred or normalised over space where configured, 0 where padded,
        float32.
      subject_ids: which subject a reference shows.
      real: False where a reference is padding.
      grid: token rows and columns of a reference, P = rows·columns.
      subject_mask: True where a token counts; None for all tokens of real references.
    """

    features: Float[Array, "B R P E"]
    subject_ids: Int[Array, "B R"]
    real: Bool[Array, "B R"]
    grid: tuple[int, int]
    subject_mask: Bool[Array, "B R P"] | None = None


def make_targets(
    features: Float[Array, "B R _ E"],
    subject_ids: Int[Array, "B R"],
    num_references: Int[Array, " B"],
    grid: tuple[int, int],
    config: AlignmentConfig,
    patches: SubjectPatches | None = None,
) -> Targets:
    """Checks and masks the VFM's tokens, once for all blocks.

    Args:
      features: VFM tokens on the references' grid, as stored.
      subject_ids: which subject a reference shows.
      num_references: references that are real; the others stand behind them and are padding.
      grid: token rows and columns of a reference, P = rows·columns.
      config: width, centring and normalisation of targets.
      patches: which of the tokens show a subject; required by the options that leave out blank patches.

    Raises:
      ValueError: targets of another width or grid than configured, or nothing on patches where it is required.
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
    features = features.astype(jnp.float32)
    if config.center_targets != "none":
        features = features - _target_mean(features, patches, config)
    features = jnp.where(real[..., None, None], features, 0)
    if config.normalize_targets:
        features = normalize_targets(features, config.target_mean_removed)
    mask = None
    if config.subject_patches_only:
        if patches is None:
            raise ValueError(f"AlignmentConfig.subject_patches_only needs {_MASK_NEEDED}")
        mask = patches.mask & real[..., None]
    return Targets(features, subject_ids, real, grid, mask)


_MASK_NEEDED = "to know which patches show a subject; give `patches`, a SubjectPatches."


def _target_mean(
    features: Float[Array, "B R P E"], patches: SubjectPatches | None, config: AlignmentConfig
) -> Float[Array, "B _ 1 E"]:
    """The mean that `center_targets` subtracts; 0 for a reference without a token that shows a subject."""
    if patches is None:
        raise ValueError(f"AlignmentConfig.center_targets={config.center_targets!r} needs {_MASK_NEEDED}")
    if config.center_targets == "reference":
        shown = patches.mask[..., None]
        number = jnp.maximum(jnp.sum(shown, axis=2, keepdims=True), 1)
        return jnp.sum(jnp.where(shown, features, 0), axis=2, keepdims=True) / number
    if patches.mean is None:
        raise ValueError(
            "AlignmentConfig.center_targets='dataset' needs the mean over the dataset; give it in patches."
        )
    return patches.mean.astype(jnp.float32)[:, None, None]


def remaining_push(targets: Targets, config: AlignmentConfig) -> Float[Array, " B"]:
    """L₋ of a student that equals its targets, L₊ = 0, for each sample: how far pull and push contradict each other.

    Below this value the push can only fall if the student leaves its targets. It is 0 with fewer than two subjects.

    Args:
      targets: what `make_targets` returned.
      config: the margins.
    """
    features = targets.features
    return pull_push(features, features, targets.subject_ids, targets.real, config, targets.subject_mask)[1]


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
        return pull_push(student, features, targets.subject_ids, targets.real, config, targets.subject_mask)

    with jax.named_scope("alignment"):
        return terms(projector, tokens, targets.features)


def observer(
    projectors: Params, targets: Targets, config: AlignmentConfig, step: Int[Array, ""]
) -> Observer[tuple[Array, Array]]:
    """An observer of the transformer that computes L₊ and L₋ after each aligned block, [A, B] each.

    From `stop_step` on, neither the terms nor their gradients are computed, and both are 0.

    Args:
      projectors: of all aligned blocks, as `init_projectors` returns them.
      targets: what `make_targets` returned.
      config: margins, kind of projector, number of blocks, `stop_step`.
      step: training step.
    """

    def observe(streams: tuple[Array, ...], projector: Params) -> tuple[Array, Array]:
        tokens = checkpoint_name(streams[1], OBSERVED)

        def terms() -> tuple[Array, Array]:
            return block_terms(projector, tokens, targets, config)

        def nothing() -> tuple[Array, Array]:
            zeros = jnp.zeros(targets.features.shape[0])
            return zeros, zeros

        return jax.lax.cond(step < config.stop_step, terms, nothing) if config.stop_step else terms()

    return Observer(config.num_blocks, observe, projectors)


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
