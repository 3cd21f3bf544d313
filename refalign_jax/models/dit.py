"""The Wan2.1 diffusion transformer with a reference branch, as plain functions of its parameters.

    tokens   = patch_embedding(noisy video latents), patch_embedding(clean reference latents)       embed
    tokens   = block_i(tokens, time, text),  i = 0 … layers - 1                                     run_blocks, block.py
    velocity = head(video tokens)                                                                   unembed

The alignment loss compares the reference tokens after the first A blocks with the VFM's features; an `Observer`
computes it on the way. Without references this is Wan2.1 T2V, so its published weights fit.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec

from refalign_jax.config import DiTConfig
from refalign_jax.models.attention import CUDNN_FORWARD
from refalign_jax.models.block import BLOCK_INPUT, Block, Head, Shared, Streams
from refalign_jax.models.condition import Condition
from refalign_jax.models.gradients import STATISTICS
from refalign_jax.models.layers import HIDDEN_OUTPUT, LINEAR_OUTPUT, MLP, Linear, init_stack
from refalign_jax.models.quantise import dequantise, is_quantised
from refalign_jax.models.rope import rotation, time_sinusoid
from refalign_jax.models.splash import ATTENTION_OUTPUT
from refalign_jax.sharding import BATCH, CONDITION, SEQUENCE, TOKENS, axis_size, constrain, is_split, on_gpu, unsharded
from refalign_jax.types import Array, Float, Params

OBSERVED = "observed"
"""Checkpoint name of the tokens that the alignment loss reads. They are few, and without them the last product of each
aligned block would be computed again for the backward pass."""

REMAT_KEEPS: dict[str, tuple[str, ...]] = {
    "dots": (OBSERVED, STATISTICS, LINEAR_OUTPUT, HIDDEN_OUTPUT, ATTENTION_OUTPUT),
    "narrow": (OBSERVED, STATISTICS, LINEAR_OUTPUT, ATTENTION_OUTPUT),
    "attention": (OBSERVED, STATISTICS, ATTENTION_OUTPUT),
    "full": (),
}
"""The activations that each remat policy retains in a block, by their checkpoint names."""


Observation = TypeVar("Observation")


@dataclasses.dataclass(frozen=True)
class Observer(Generic[Observation]):
    """What is computed from the tokens after each of the first blocks.

    It is computed within the block, so that under activation checkpointing the tokens themselves need not be retained
    for the backward pass.

    Attributes:
      num_blocks: how many blocks are observed, from the first on.
      observe: maps the streams after a block and the block's part of `params` to arrays.
      params: a tree of arrays stacked along a leading axis of length `num_blocks`, or None.
    """

    num_blocks: int
    observe: Callable[[Streams, Any], Observation]
    params: Any = None


class Inputs(NamedTuple):
    """What enters the blocks and the head.

    Attributes:
      streams: embedded tokens, in the residual dtype.
      shared: what every block reads beside them.
      e: time embedding before its projection, float32.
    """

    streams: Streams
    shared: Shared
    e: Float[Array, "B D"]


def velocity(
    params: Params,
    config: DiTConfig,
    x: Float[Array, "B F H W C"],
    t: Float[Array, " B"],
    condition: Condition,
) -> Float[Array, "B F H W C"]:
    """Predicts the velocity noise - x₀ of noisy latents.

    Args:
      params: of the transformer, as `init` returns them.
      config: its sizes and how it computes.
      x: noisy video latents, normalised.
      t: time in [0, 1000], float32.
      condition: prompt and references.

    Returns:
      The velocity, float32.

    Raises:
      ValueError: the latent grid is not divisible by the patch, or reaches beyond the rotary table.
    """
    inputs = embed(params, config, x, t, condition)
    streams, _ = run_blocks(params["blocks"], config, inputs, Observer(0, lambda streams, _: None))
    return unembed(params, config, streams[0], inputs.e, x.shape)


def observe(
    params: Params,
    config: DiTConfig,
    x: Float[Array, "B F H W C"],
    t: Float[Array, " B"],
    condition: Condition,
    observer: Observer[Observation],
) -> tuple[Float[Array, "B F H W C"], Observation]:
    """Predicts the velocity as `velocity` does and returns what `observer` computes on the way.

    Args:
      params: as in `velocity`.
      config: as in `velocity`.
      x: as in `velocity`.
      t: as in `velocity`.
      condition: as in `velocity`.
      observer: of at least one block.

    Returns:
      The velocity, and the observations of each block, stacked along a leading axis.

    Raises:
      ValueError: as in `velocity`.
    """
    inputs = embed(params, config, x, t, condition)
    streams, observations = run_blocks(params["blocks"], config, inputs, observer)
    return unembed(params, config, streams[0], inputs.e, x.shape), observations


def reference_tokens(config: DiTConfig, num_blocks: int, references: tuple[int, ...]) -> Observer[Array]:
    """An observer that returns the reference tokens after each block, [B, R, P, D], in the residual dtype.

    Args:
      config: of the transformer.
      num_blocks: how many blocks are observed.
      references: the shape of `Condition.reference_latents`, [B, R, H, W, C].
    """
    B = references[0]
    R, rows, columns = token_grid(config, references)
    return Observer(
        num_blocks, lambda streams, _: streams[1][:, : R * rows * columns].reshape(B, R, rows * columns, config.width)
    )


def all_tokens(config: DiTConfig) -> Observer[Array]:
    """An observer that returns all tokens after every block, [B, T, D]: video tokens, then reference tokens."""
    return Observer(config.num_layers, lambda streams, _: jnp.concatenate(streams, axis=1))


def token_grid(config: DiTConfig, latents: tuple[int, ...]) -> tuple[int, int, int]:
    """Tokens along frames, rows and columns of latents of shape [B, F, H, W, C]; raises as `DiTConfig.token_grid`."""
    return config.token_grid(*latents[1:4])


def init(config: DiTConfig, key: Array) -> dict[str, Any]:
    """Initialises the transformer's parameters.

    Args:
      config: its sizes.
      key: random key.

    Returns:
      A nested dict, float32; the parameters of all blocks are stacked along a leading layer axis.
    """
    with unsharded():  # it runs on one token, which can't be split
        return _Parameters(config).init(key)["params"]


def embed(params: Params, config: DiTConfig, x: Array, t: Array, condition: Condition) -> Inputs:
    """Embeds latents, time and text; arguments and errors as in `velocity`."""
    c, text, references = config, condition.text, condition.reference_latents
    frames, rows, columns = token_grid(c, x.shape)
    layers = _layers(c)

    def layer(name: str, x: Array) -> Array:
        y: Any = layers[name].apply({"params": params[name]}, x)
        return y

    with jax.named_scope("embed"):
        patches, lengths = [patchify(x, c)], None
        rotations = [rotation(jnp.arange(frames)[None], rows, columns, c)]
        if references is not None:
            count, ref_rows, ref_columns = token_grid(c, references.shape)
            if frames + count > c.max_position:
                raise ValueError(
                    f"{frames} frames and {count} references reach beyond DiTConfig.max_position={c.max_position}."
                )
            if condition.num_references is not None:
                real = jnp.arange(count) < condition.num_references[:, None]
                references = jnp.where(real[:, :, None, None, None], references, 0)
                lengths = patches[0].shape[1] + condition.num_references * ref_rows * ref_columns
            patches.append(patchify(references, c))
            rotations.append(rotation(frames + jnp.arange(count)[None], ref_rows, ref_columns, c))
        e = layer("time_out", nn.silu(layer("time_in", time_sinusoid(t, c.frequency_width)[:, None])))
        streams = tuple(layer("patch_embedding", _divisible(x)).astype(c.residual_dtype) for x in patches)
        shared = Shared(
            time=layer("time_projection", nn.silu(e)).reshape(-1, 6, c.width),
            text=layer("text_embedding", text),
            rotations=tuple((_divisible(cos), _divisible(sin)) for cos, sin in rotations),
            sizes=tuple(x.shape[1] for x in patches),
            lengths=lengths,
        )
        return Inputs(streams, shared, e[:, 0])


def run_blocks(
    params: Params, config: DiTConfig, inputs: Inputs, observer: Observer[Observation]
) -> tuple[Streams, Observation]:
    """Runs all blocks over their stacked parameters.

    Returns:
      The streams after the last block, and the observations of the first `observer.num_blocks` blocks, stacked along a
      leading axis; None where no block is observed.
    """
    dtype = jnp.dtype(config.compute_dtype)
    params = _cast_kernels(params, dtype)
    inputs, split = _one_stream(inputs)
    streams, observed, observations = inputs.streams, observer.num_blocks, None

    def scan(streams: Streams, part: slice, observe: Callable[[Streams, Any], Any], more: Any) -> tuple[Streams, Any]:
        def body(streams: Streams, params: tuple[Params, Any]) -> tuple[Streams, Any]:
            block = dequantise(params[0], dtype)  # within the loop, so that one block is at full size
            outputs: Any = Block(config).apply({"params": block}, streams, inputs.shared)
            return outputs, observe(split(outputs), params[1])

        if config.remat != "none":
            body = jax.checkpoint(body, policy=_keeps(config), prevent_cse=False)
        with jax.named_scope("blocks"):
            return jax.lax.scan(body, streams, (jax.tree.map(lambda x: x[part], params), more))

    if observed:
        streams, observations = scan(streams, slice(None, observed), observer.observe, observer.params)
    if config.num_layers > observed:
        streams, _ = scan(streams, slice(observed, None), lambda streams, _: None, None)
    return split(streams), observations  # type: ignore[return-value]


def _one_stream(inputs: Inputs) -> tuple[Inputs, Callable[[Streams], Streams]]:
    """Joins the streams where that saves work (see block.py); returns the inputs, and what splits the streams again."""
    shared = inputs.shared
    if len(inputs.streams) == 1 or axis_size(*SEQUENCE) > 1 or (is_split() and not on_gpu()):
        return inputs, lambda streams: streams
    cos, sin = (jnp.concatenate(tables, axis=1) for tables in zip(*shared.rotations, strict=True))
    video = shared.sizes[0]
    joined = shared._replace(rotations=((cos, sin),), sizes=(sum(shared.sizes),), video=video)
    streams = (jnp.concatenate(inputs.streams, axis=1),)
    return inputs._replace(streams=streams, shared=joined), lambda x: (x[0][:, :video], x[0][:, video:])


def unembed(
    params: Params, config: DiTConfig, video: Float[Array, "B _ D"], e: Float[Array, "B D"], shape: tuple[int, ...]
) -> Float[Array, "B F H W C"]:
    """Maps the video tokens after the last block to the velocity of latents of `shape`, float32."""
    grid = token_grid(config, shape)
    with jax.named_scope("head"):
        patches: Any = _layers(config)["head"].apply({"params": params["head"]}, video, e)
    return unpatchify(patches[:, : math.prod(grid)], grid, config)


def patchify(latents: Float[Array, "B F H W C"], config: DiTConfig) -> Float[Array, "B L V"]:
    """Latents to tokens of patch values: `(f h w)` tokens, `(row column channel)` values. L = F·H/ph·W/pw."""
    B, F, H, W, C = latents.shape
    _, ph, pw = config.patch_size
    x = latents.reshape(B, F, H // ph, ph, W // pw, pw, C)
    return x.transpose(0, 1, 2, 4, 3, 5, 6).reshape(B, -1, config.patch_values)


def unpatchify(
    patches: Float[Array, "B L V"], grid: tuple[int, int, int], config: DiTConfig
) -> Float[Array, "B F H W C"]:
    """Inverse of `patchify` for a token grid (frames, rows, columns)."""
    frames, rows, columns = grid
    _, ph, pw = config.patch_size
    x = patches.reshape(-1, frames, rows, columns, ph, pw, config.latent_channels)
    return x.transpose(0, 1, 2, 4, 3, 5, 6).reshape(-1, frames, rows * ph, columns * pw, config.latent_channels)


class _Parameters(nn.Module):
    """Declares every parameter, by running each layer on one token."""

    config: DiTConfig

    @nn.compact
    def __call__(self) -> None:
        c = self.config
        token = jnp.zeros((1, 1, c.width))
        inputs = {
            "patch_embedding": jnp.zeros((1, 1, c.patch_values)),
            "text_embedding": jnp.zeros((1, 1, c.text_width)),
            "time_in": jnp.zeros((1, 1, c.frequency_width)),
        }
        for name, layer in _layers(c).items():
            layer(token, token[:, 0]) if name == "head" else layer(inputs.get(name, token))
        turn = rotation(jnp.zeros((1, 1), jnp.int32), 1, 1, c)
        shared = Shared(time=jnp.zeros((1, 6, c.width)), text=token, rotations=(turn,), sizes=(1,), lengths=None)
        block = Block(c, parent=None)
        self.param("blocks", lambda key: init_stack(block, c.num_layers, key, (token,), shared))


def _layers(config: DiTConfig) -> dict[str, nn.Module]:
    """The layers around the blocks, by the name of their parameters."""
    c, small = config, nn.initializers.normal(0.02)
    dtype, float32 = jnp.dtype(c.compute_dtype), jnp.dtype(jnp.float32)
    return {
        "patch_embedding": Linear(c.width, float32, name="patch_embedding"),
        "text_embedding": MLP(c.width, c.width, dtype, CONDITION, BATCH, name="text_embedding"),
        "time_in": Linear(c.width, float32, BATCH, kernel_init=small, name="time_in"),
        "time_out": Linear(c.width, float32, BATCH, kernel_init=small, name="time_out"),
        "time_projection": Linear(6 * c.width, float32, BATCH, name="time_projection"),
        "head": Head(c, name="head"),
    }


def _keeps(config: DiTConfig) -> Callable[..., Any]:
    """The remat policy: which results of a block are retained for the backward pass, on the device or on the host."""
    names = REMAT_KEEPS[config.remat]
    named = jax.checkpoint_policies.save_only_these_names(*names)
    if config.offload:
        named = jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=list(names),
            names_which_can_be_offloaded=[BLOCK_INPUT],
            offload_src="device",
            offload_dst="pinned_host",
        )

    def keeps(primitive: Any, *args: Any, **params: Any) -> Any:
        if primitive.name == CUDNN_FORWARD:
            return ATTENTION_OUTPUT in names
        return named(primitive, *args, **params)

    return keeps


def _divisible(x: Float[Array, "#B T *rest"]) -> Float[Array, "#B U *rest"]:
    """Pads axis 1, tokens, with zeros until the ambient mesh's ring and context divide it, and splits it there."""
    missing = -x.shape[1] % axis_size(*SEQUENCE)
    x = jnp.pad(x, ((0, 0), (0, missing), *((0, 0),) * (x.ndim - 2)))
    return constrain(x, TOKENS if x.shape[0] > 1 else PartitionSpec(None, SEQUENCE))


def _cast_kernels(params: Params, dtype: jnp.dtype) -> Params:
    """Casts the matmul kernels once, ahead of the loop: their all-gathers and their reads are 16-bit then."""

    def cast(path: tuple[Any, ...], x: Any) -> Any:
        return x.astype(dtype) if path[-1].key == "kernel" and not is_quantised(x) else x

    return jax.tree_util.tree_map_with_path(cast, params, is_leaf=is_quantised)
