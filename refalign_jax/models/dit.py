"""The Wan2.1 diffusion transformer with a reference branch.

Noisy video latents and clean reference latents pass the same patch embedding and the same blocks. In each block

    x += gate₁ · SelfAttention(LN(x)·(1 + scale₁) + shift₁)      over video and reference tokens together
    x += CrossAttention(LN_affine(x), text)                      video tokens only
    x += gate₂ · FFN(LN(x)·(1 + scale₂) + shift₂)

with shift, scale and gate from the time embedding. A head turns video tokens into the velocity; the reference tokens
after the first A blocks are what the alignment loss sees. Without references this is Wan2.1 T2V, so its published
weights fit.

Video and reference tokens stay two arrays, here called streams, and meet in attention alone. So nothing is cut out of
a longer sequence, and on a mesh each stream is split evenly by itself, padded where its tokens don't divide.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, PartitionSpec

from refalign_jax.config import DiTConfig
from refalign_jax.models.attention import ATTENTION_OUTPUT, CUDNN_FORWARD, cross_attention, self_attention
from refalign_jax.models.layers import HIDDEN_OUTPUT, LINEAR_OUTPUT, Linear, RMSNorm, layer_norm
from refalign_jax.models.rope import Rotation, rotate, rotation, time_sinusoid
from refalign_jax.sharding import BATCH, CONDITION, CONTEXT, HIDDEN, TOKENS, constrain, context_parts
from refalign_jax.types import Array, Float, Int, Params

Streams = tuple[Float[Array, "B _ D"], ...]
"""(video tokens [B, L, D],) or (video tokens [B, L, D], reference tokens [B, R·P, D]), and padding behind each."""

BLOCK_INPUT = "block_input"
"""Name of what a block begins with, which can wait in the host's memory."""

REMAT_KEEPS: dict[str, tuple[str, ...]] = {
    "dots": (LINEAR_OUTPUT, HIDDEN_OUTPUT, ATTENTION_OUTPUT),
    "narrow": (LINEAR_OUTPUT, ATTENTION_OUTPUT),
    "attention": (ATTENTION_OUTPUT,),
    "full": (),
}
"""What each remat policy keeps of a block, by the names given to `checkpoint_name`."""


class SelfAttention(nn.Module):
    """Attention of all tokens to all tokens; queries and keys RMS-normalised over D, then rotated."""

    config: DiTConfig

    @nn.compact
    def __call__(
        self,
        streams: Streams,
        rotations: tuple[Rotation, ...],
        sizes: tuple[int, ...],
        lengths: Int[Array, " B"] | None,
    ) -> Streams:
        """Returns the attended streams, shapes kept.

        Args:
          streams: normed tokens.
          rotations: RoPE of each stream.
          sizes: tokens of each stream without what pads it.
          lengths: tokens of each sample that are no padded references; None, all.
        """
        c = self.config
        dtype = jnp.dtype(c.compute_dtype)
        query, key, value = (Linear(c.width, dtype, HIDDEN, name=name) for name in ("query", "key", "value"))
        query_norm, key_norm = (RMSNorm(c.eps, name=name) for name in ("query_norm", "key_norm"))
        turned = tuple(zip(streams, rotations, strict=True))
        attended = self_attention(
            tuple(rotate(_heads(query_norm(query(x)), c), turn) for x, turn in turned),
            tuple(rotate(_heads(key_norm(key(x)), c), turn) for x, turn in turned),
            tuple(_heads(value(x), c) for x in streams),
            sizes,
            lengths,
            c.attention,
            c.tiles,
        )
        out = Linear(c.width, dtype, name="out")
        return tuple(out(_merge(x)) for x in attended)


class CrossAttention(nn.Module):
    """Attention of video tokens to the text; queries and keys RMS-normalised over D."""

    config: DiTConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"], text: Float[Array, "B S D"]) -> Float[Array, "B L D"]:
        """Returns the attended video tokens."""
        c = self.config
        dtype = jnp.dtype(c.compute_dtype)
        query = Linear(c.width, dtype, HIDDEN, name="query")
        key, value = (Linear(c.width, dtype, CONDITION, name=name) for name in ("key", "value"))
        q = _heads(RMSNorm(c.eps, name="query_norm")(query(x)), c)
        k = _heads(RMSNorm(c.eps, name="key_norm")(key(text)), c)
        attended = cross_attention(q, k, _heads(value(text), c), c.attention, c.tiles)
        return Linear(c.width, dtype, name="out")(_merge(attended))


class FeedForward(nn.Module):
    """Linear, GELU (tanh), Linear."""

    hidden: int
    features: int
    dtype: jnp.dtype
    hidden_place: PartitionSpec = HIDDEN
    place: PartitionSpec = TOKENS

    @nn.compact
    def __call__(self, x: Float[Array, "B T I"]) -> Float[Array, "B T O"]:
        """Returns [B, T, features]."""
        x = Linear(self.hidden, self.dtype, self.hidden_place, HIDDEN_OUTPUT, name="in")(x)
        return Linear(self.features, self.dtype, self.place, name="out")(nn.gelu(x, approximate=True))


class Block(nn.Module):
    """One transformer block."""

    config: DiTConfig

    @nn.compact
    def __call__(
        self,
        streams: Streams,
        time: Float[Array, "B 6 D"],
        text: Float[Array, "B S D"],
        rotations: tuple[Rotation, ...],
        sizes: tuple[int, ...],
        lengths: Int[Array, " B"] | None,
    ) -> Streams:
        """Maps the streams to the streams after this block.

        Args:
          streams: video and reference tokens, in the residual dtype.
          time: the projected time, float32: shift, scale, gate of attention, then of the feed-forward network.
          text: embedded text, in the compute dtype.
          rotations: RoPE of each stream.
          sizes: tokens of each stream without what pads it.
          lengths: tokens of each sample that are no padded references; None, all.
        """
        c = self.config
        dtype = jnp.dtype(c.compute_dtype)
        streams = tuple(checkpoint_name(constrain(x, TOKENS), BLOCK_INPUT) for x in streams)
        modulation = self.param("modulation", nn.initializers.normal(c.width**-0.5), (6, c.width))
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split((time + modulation).astype(jnp.float32), 6, axis=1)

        inputs = tuple(_modulate(x, shift1, scale1, c.eps).astype(dtype) for x in streams)
        outputs = SelfAttention(c, name="self_attention")(inputs, rotations, sizes, lengths)
        video, *reference = (_gated(x, gate1, y) for x, y in zip(streams, outputs, strict=True))

        normed = nn.LayerNorm(c.eps, use_fast_variance=False, dtype=jnp.float32, name="cross_norm")(video)
        attended = CrossAttention(c, name="cross_attention")(normed.astype(dtype), text)
        video = (video + attended).astype(video.dtype)

        ffn = FeedForward(c.ffn_width, c.width, dtype, name="ffn")
        return tuple(
            _gated(x, gate2, ffn(_modulate(x, shift2, scale2, c.eps).astype(dtype))) for x in (video, *reference)
        )


class Head(nn.Module):
    """Modulated norm and the linear map from a token to its patch of the velocity, in float32."""

    config: DiTConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"], e: Float[Array, "B D"]) -> Float[Array, "B L V"]:
        """Returns the velocity [B, L, patch values] in float32; `e` is the time embedding before its projection."""
        c = self.config
        modulation = self.param("modulation", nn.initializers.normal(c.width**-0.5), (2, c.width))
        shift, scale = jnp.split((e[:, None] + modulation).astype(jnp.float32), 2, axis=1)
        linear = Linear(c.patch_values, jnp.dtype(jnp.float32), kernel_init=nn.initializers.zeros, name="linear")
        return linear(_modulate(x, shift, scale, c.eps))


class DiT(nn.Module):
    """The whole transformer; see the module's docstring. `init_params` makes its parameters."""

    config: DiTConfig

    def setup(self) -> None:
        """Declares the layers; the parameters of all blocks are stacked along a leading layer axis."""
        c = self.config
        dtype, float32 = jnp.dtype(c.compute_dtype), jnp.dtype(jnp.float32)
        small = nn.initializers.normal(0.02)
        self.patch_embedding = Linear(c.width, float32)
        self.text_embedding = FeedForward(c.width, c.width, dtype, CONDITION, BATCH)
        self.time_in = Linear(c.width, float32, BATCH, kernel_init=small)
        self.time_out = Linear(c.width, float32, BATCH, kernel_init=small)
        self.time_projection = Linear(6 * c.width, float32, BATCH)
        self.head = Head(c)
        self.blocks = self.param("blocks", functools.partial(_init_blocks, c))

    def __call__(
        self,
        latents: Float[Array, "B F H W C"],
        t: Float[Array, " B"],
        text: Float[Array, "B S text_width"],
        reference_latents: Float[Array, "B R H W C"] | None = None,
        num_references: Int[Array, " B"] | None = None,
        reference_positions: Int[Array, "B R"] | None = None,
        num_feature_blocks: int = 0,
        tap: Callable[[Params, Float[Array, "B _ D"]], Any] | None = None,
        tap_params: Params | None = None,
    ) -> tuple[Float[Array, "B F H W C"], Any]:
        """Predicts the velocity, and returns the reference tokens of the first blocks, or what `tap` makes of them.

        Args:
          latents: noisy video latents, normalised.
          t: time in [0, 1000], float32.
          text: text embeddings, padding rows zero; all rows are attended to.
          reference_latents: clean reference latents, normalised, one frame each; None for plain text-to-video.
          num_references: how many of the R references of each sample are real; the rest is padding behind them, of
            any content, and invisible. None, all R.
          reference_positions: time position of each reference; None, F + r as published.
          num_feature_blocks: A, after how many blocks the reference tokens are tapped.
          tap: maps a block's part of `tap_params` and its reference tokens [B, ≥ R·P, D] to arrays. It runs within
            the block, so that the tokens themselves need not be kept for the backward pass. None returns the tokens.
          tap_params: of the tap, stacked along a leading axis A.

        Returns:
          The velocity in float32 and, if A > 0, the tap's results stacked along a leading axis A; by default the
          reference tokens [A, B, R, P, D] in the residual dtype (undefined where a reference is padding). Else None.

        Raises:
          ValueError: the latent grid is not divisible by the patch or too large for the rotary table.
        """
        c, A = self.config, num_feature_blocks if reference_latents is not None else 0
        streams, e, block = self._embed(latents, t, text, reference_latents, num_references, reference_positions)
        params = _cast_kernels(self.blocks, jnp.dtype(c.compute_dtype))
        features: Any = None
        if A:
            first, rest = (
                jax.tree.map(lambda x, part=part: x[part], params) for part in (slice(None, A), slice(A, None))
            )
            tapped = (lambda s, p: s[1]) if tap is None else (lambda s, p: tap(p, s[1]))
            streams, features = _scan(block, streams, (first, tap_params), c, tapped)
            params = rest
        if c.num_layers > A:
            streams, _ = _scan(block, streams, (params, None), c, lambda s, p: None)
        if A and tap is None:
            assert reference_latents is not None
            count, rows, columns = c.token_grid(*reference_latents.shape[1:4])
            features = features[:, :, : count * rows * columns].reshape(A, latents.shape[0], count, -1, c.width)
        grid = c.token_grid(*latents.shape[1:4])
        patches = self.head(streams[0], e)[:, : grid[0] * grid[1] * grid[2]]
        return unpatchify(patches, grid, c), features

    def hidden_states(
        self,
        latents: Float[Array, "B F H W C"],
        t: Float[Array, " B"],
        text: Float[Array, "B S text_width"],
        reference_latents: Float[Array, "B R H W C"] | None = None,
    ) -> Float[Array, "layers B T D"]:
        """Returns all tokens (video, then references) after every block; for finding where two codes diverge.

        Arguments as in `__call__`; the result holds layers × tokens × D values.
        """
        config = dataclasses.replace(self.config, remat="none", offload=False)
        streams, _, block = self._embed(latents, t, text, reference_latents, None, None)
        params = _cast_kernels(self.blocks, jnp.dtype(config.compute_dtype))
        _, states = _scan(block, streams, (params, None), config, lambda s, p: jnp.concatenate(s, axis=1))
        return states

    def _embed(
        self,
        latents: Array,
        t: Array,
        text: Array,
        reference_latents: Array | None,
        num_references: Array | None,
        reference_positions: Array | None,
    ) -> tuple[Streams, Array, Callable[[Streams, Params], Streams]]:
        """Tokens of each stream, the time embedding, and a block with all of its inputs but tokens and parameters."""
        c = self.config
        frames, rows, columns = c.token_grid(*latents.shape[1:4])
        with jax.named_scope("embed"):
            patches = [patchify(latents, c)]
            rotations = [rotation(jnp.arange(frames)[None], rows, columns, c)]
            lengths = None
            if reference_latents is not None:
                count, ref_rows, ref_columns = c.token_grid(*reference_latents.shape[1:4])
                if reference_positions is None:
                    if frames + count > c.max_position:
                        raise ValueError(
                            f"{frames} frames and {count} references reach beyond DiTConfig.max_position="
                            f"{c.max_position}."
                        )
                    reference_positions = frames + jnp.arange(count)[None]
                if num_references is not None:
                    real = jnp.arange(count) < num_references[:, None]
                    reference_latents = jnp.where(real[:, :, None, None, None], reference_latents, 0)
                    lengths = patches[0].shape[1] + num_references * ref_rows * ref_columns
                patches.append(patchify(reference_latents, c))
                rotations.append(rotation(reference_positions, ref_rows, ref_columns, c))
            sizes = tuple(x.shape[1] for x in patches)
            streams = tuple(self.patch_embedding(_divisible(x)).astype(c.residual_dtype) for x in patches)
            turns = tuple((_divisible(cos), _divisible(sin)) for cos, sin in rotations)
            embedded_text = self.text_embedding(text)
            sinusoid = time_sinusoid(t, c.frequency_width)[:, None]
            e = self.time_out(nn.silu(self.time_in(sinusoid)))
            time = self.time_projection(nn.silu(e)).reshape(-1, 6, c.width)

        def block(streams: Streams, params: Params) -> Streams:
            outputs: Any = Block(c, parent=None).apply(
                {"params": params}, streams, time, embedded_text, turns, sizes, lengths
            )
            return outputs

        return streams, e[:, 0], block


def init_params(config: DiTConfig, key: Array) -> dict[str, Any]:
    """Initialises the transformer's parameters, float32, blocks stacked; jit-able and `eval_shape`-able."""
    _, ph, pw = config.patch_size
    latents = jnp.zeros((1, 1, ph, pw, config.latent_channels))
    text = jnp.zeros((1, 1, config.text_width))
    return DiT(config).init(key, latents, jnp.zeros((1,)), text)["params"]


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


def _init_blocks(config: DiTConfig, key: Array) -> Params:
    """Parameters of all blocks, stacked along axis 0."""
    tokens = jnp.zeros((1, 1, config.width))
    turn = rotation(jnp.zeros((1, 1), jnp.int32), 1, 1, config)

    def one(key: Array) -> Params:
        inputs = (tokens,), jnp.zeros((1, 6, config.width)), tokens, (turn,), (1,), None
        with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):  # one token can't be split
            return Block(config, parent=None).init(key, *inputs)["params"]

    return jax.vmap(one)(jax.random.split(key, config.num_layers))


def _scan(
    block: Callable[[Streams, Params], Streams],
    streams: Streams,
    params: tuple[Params, Params | None],
    config: DiTConfig,
    tap: Callable[[Streams, Params | None], Any],
) -> tuple[Streams, Any]:
    """Runs the blocks over stacked parameters, (theirs, the tap's); stacks what `tap` makes of each block's output."""

    def body(streams: Streams, params: tuple[Params, Params | None]) -> tuple[Streams, Any]:
        streams = block(streams, params[0])
        return streams, tap(streams, params[1])

    if config.remat != "none":
        body = jax.checkpoint(body, policy=_keeps(config), prevent_cse=False)
    with jax.named_scope("blocks"):
        return jax.lax.scan(body, streams, params)


def _keeps(config: DiTConfig) -> Callable[..., Any]:
    """The remat policy: of each operation of a block, whether its results are kept, here or in the host's memory."""
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
    """Pads axis 1, tokens, with zeros until the ambient mesh's context divides it, and splits it there."""
    missing = -x.shape[1] % context_parts()
    x = jnp.pad(x, ((0, 0), (0, missing), *((0, 0),) * (x.ndim - 2)))
    return constrain(x, TOKENS if x.shape[0] > 1 else PartitionSpec(None, CONTEXT))


def _cast_kernels(params: Params, dtype: jnp.dtype) -> Params:
    """Casts the matmul kernels once, ahead of the loop: their all-gathers and their reads are 16-bit then."""
    return jax.tree_util.tree_map_with_path(lambda path, x: x.astype(dtype) if path[-1].key == "kernel" else x, params)


def _heads(x: Float[Array, "B T D"], config: DiTConfig) -> Float[Array, "B T N K"]:
    return x.reshape(*x.shape[:2], config.num_heads, config.head_width)


def _merge(x: Float[Array, "B T N K"]) -> Float[Array, "B T D"]:
    return x.reshape(*x.shape[:2], -1)


def _modulate(
    x: Float[Array, "B T D"], shift: Float[Array, "B 1 D"], scale: Float[Array, "B 1 D"], eps: float
) -> Float[Array, "B T D"]:
    """LN(x)·(1 + scale) + shift in float32."""
    return layer_norm(x, eps) * (1 + scale) + shift


def _gated(x: Float[Array, "B T D"], gate: Float[Array, "B 1 D"], y: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Returns x + gate·y, summed in float32, in x's dtype."""
    return (x + gate * y).astype(x.dtype)
