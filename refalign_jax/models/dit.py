"""The Wan2.1 diffusion transformer with a reference branch.

Noisy video latents and clean reference latents pass the same patch embedding and the same blocks. In each block

    x += gate₁ · SelfAttention(LN(x)·(1 + scale₁) + shift₁)      over video and reference tokens together
    x += CrossAttention(LN_affine(x), text)                      video tokens only
    x += gate₂ · FFN(LN(x)·(1 + scale₂) + shift₂)

with shift, scale and gate from the time embedding. A head turns video tokens into the velocity; the reference tokens
after the first A blocks are what the alignment loss sees. Without references this is Wan2.1 T2V, so its published
weights fit.

Video and reference tokens stay two arrays, here called streams, and meet in attention alone. So nothing is cut out of
a longer sequence, and on a mesh each stream is sharded evenly by itself.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from refalign_jax.config import DiTConfig, RematPolicy
from refalign_jax.models.attention import ATTENTION_OUTPUT, attention
from refalign_jax.models.layers import LINEAR_OUTPUT, Linear, RMSNorm, layer_norm
from refalign_jax.models.rope import Rotation, rotate, rotation, time_sinusoid
from refalign_jax.types import Array, Float, Int, Params

Streams = tuple[Float[Array, "B _ D"], ...]
"""(video tokens [B, L, D],) or (video tokens [B, L, D], reference tokens [B, R·P, D])."""


class SelfAttention(nn.Module):
    """Attention of all tokens to all tokens; queries and keys RMS-normalised over D, then rotated."""

    config: DiTConfig

    @nn.compact
    def __call__(self, streams: Streams, rotations: tuple[Rotation, ...], lengths: Int[Array, " B"] | None) -> Streams:
        """Returns the attended streams, shapes kept; `lengths` counts the tokens that are no padding."""
        c = self.config
        dtype = jnp.dtype(c.compute_dtype)
        query, key, value, out = (Linear(c.width, dtype, name=name) for name in ("query", "key", "value", "out"))
        query_norm, key_norm = (RMSNorm(c.eps, name=name) for name in ("query_norm", "key_norm"))
        q, k, v = (
            jnp.concatenate(parts, axis=1)
            for parts in zip(
                *[
                    (
                        rotate(_heads(query_norm(query(x)), c), turn),
                        rotate(_heads(key_norm(key(x)), c), turn),
                        _heads(value(x), c),
                    )
                    for x, turn in zip(streams, rotations, strict=True)
                ],
                strict=True,
            )
        )
        attended = _merge(attention(q, k, v, lengths, c.attention))
        starts = [0, streams[0].shape[1], attended.shape[1]]
        return tuple(out(attended[:, a:b]) for a, b in itertools.pairwise(starts) if b > a)


class CrossAttention(nn.Module):
    """Attention of video tokens to the text; queries and keys RMS-normalised over D."""

    config: DiTConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"], text: Float[Array, "B S D"]) -> Float[Array, "B L D"]:
        """Returns the attended video tokens."""
        c = self.config
        dtype = jnp.dtype(c.compute_dtype)
        query, key, value, out = (Linear(c.width, dtype, name=name) for name in ("query", "key", "value", "out"))
        q = _heads(RMSNorm(c.eps, name="query_norm")(query(x)), c)
        k = _heads(RMSNorm(c.eps, name="key_norm")(key(text)), c)
        return out(_merge(attention(q, k, _heads(value(text), c), kernel=c.attention)))


class FeedForward(nn.Module):
    """Linear, GELU (tanh), Linear."""

    hidden: int
    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "B T I"]) -> Float[Array, "B T O"]:
        """Returns [B, T, features]."""
        x = nn.gelu(Linear(self.hidden, self.dtype, name="in")(x), approximate=True)
        return Linear(self.features, self.dtype, name="out")(x)


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
        lengths: Int[Array, " B"] | None,
    ) -> Streams:
        """Maps the streams to the streams after this block.

        Args:
          streams: video and reference tokens, in the residual dtype.
          time: the projected time, float32: shift, scale, gate of attention, then of the feed-forward network.
          text: embedded text, in the compute dtype.
          rotations: RoPE of each stream.
          lengths: tokens of each sample that are no padding; None, all.
        """
        c = self.config
        dtype = jnp.dtype(c.compute_dtype)
        modulation = self.param("modulation", nn.initializers.normal(c.width**-0.5), (6, c.width))
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split((time + modulation).astype(jnp.float32), 6, axis=1)

        inputs = tuple(_modulate(x, shift1, scale1, c.eps).astype(dtype) for x in streams)
        outputs = SelfAttention(c, name="self_attention")(inputs, rotations, lengths)
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
        self.text_embedding = FeedForward(c.width, c.width, dtype)
        self.time_in = Linear(c.width, float32, kernel_init=small)
        self.time_out = Linear(c.width, float32, kernel_init=small)
        self.time_projection = Linear(6 * c.width, float32)
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
    ) -> tuple[Float[Array, "B F H W C"], Float[Array, "A B R P D"] | None]:
        """Predicts the velocity, and returns the reference tokens of the first blocks where asked.

        Args:
          latents: noisy video latents, normalised.
          t: time in [0, 1000], float32.
          text: text embeddings, padding rows zero; all rows are attended to.
          reference_latents: clean reference latents, normalised, one frame each; None for plain text-to-video.
          num_references: how many of the R references of each sample are real; the rest is padding behind them, of
            any content, and invisible. None, all R.
          reference_positions: time position of each reference; None, F + r as published.
          num_feature_blocks: A, after how many blocks the reference tokens are returned.

        Returns:
          The velocity in float32 and, if A > 0, the reference tokens after blocks 0..A-1 in the residual dtype
          (undefined where a reference is padding), else None.

        Raises:
          ValueError: the latent grid is not divisible by the patch or too large for the rotary table.
        """
        state = self._embed(latents, t, text, reference_latents, num_references, reference_positions)
        streams, e, block = state
        params = _cast_kernels(self.blocks, jnp.dtype(self.config.compute_dtype))
        features = None
        if num_feature_blocks and reference_latents is not None:
            first, rest = (
                jax.tree.map(lambda x, part=part: x[part], params)
                for part in (slice(None, num_feature_blocks), slice(num_feature_blocks, None))
            )
            streams, features = _scan(block, streams, first, self.config.remat, lambda s: s[1])
            if num_feature_blocks < self.config.num_layers:
                streams, _ = _scan(block, streams, rest, self.config.remat, lambda s: None)
            features = features.reshape(*features.shape[:2], reference_latents.shape[1], -1, self.config.width)
        else:
            streams, _ = _scan(block, streams, params, self.config.remat, lambda s: None)
        patches = self.head(streams[0], e)
        grid = self.config.token_grid(*latents.shape[1:4])
        return unpatchify(patches, grid, self.config), features

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
        streams, _, block = self._embed(latents, t, text, reference_latents, None, None)
        params = _cast_kernels(self.blocks, jnp.dtype(self.config.compute_dtype))
        _, states = _scan(block, streams, params, "none", lambda s: jnp.concatenate(s, axis=1))
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
            streams = [self.patch_embedding(patchify(latents, c)).astype(c.residual_dtype)]
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
                    lengths = streams[0].shape[1] + num_references * ref_rows * ref_columns
                streams.append(self.patch_embedding(patchify(reference_latents, c)).astype(c.residual_dtype))
                rotations.append(rotation(reference_positions, ref_rows, ref_columns, c))
            embedded_text = self.text_embedding(text)
            sinusoid = time_sinusoid(t, c.frequency_width)[:, None]
            e = self.time_out(nn.silu(self.time_in(sinusoid)))
            time = self.time_projection(nn.silu(e)).reshape(-1, 6, c.width)

        def block(streams: Streams, params: Params) -> Streams:
            outputs: Any = Block(c, parent=None).apply(
                {"params": params}, streams, time, embedded_text, tuple(rotations), lengths
            )
            return outputs

        return tuple(streams), e[:, 0], block


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
        return Block(config, parent=None).init(key, (tokens,), jnp.zeros((1, 6, config.width)), tokens, (turn,), None)[
            "params"
        ]

    return jax.vmap(one)(jax.random.split(key, config.num_layers))


def _scan(
    block: Callable[[Streams, Params], Streams],
    streams: Streams,
    params: Params,
    remat: RematPolicy,
    keep: Callable[[Streams], Array | None],
) -> tuple[Streams, Any]:
    """Runs the blocks over stacked parameters; stacks what `keep` takes from each block's output."""

    def body(streams: Streams, params: Params) -> tuple[Streams, Array | None]:
        streams = block(streams, params)
        return streams, keep(streams)

    names = {"dots": (LINEAR_OUTPUT, ATTENTION_OUTPUT), "attention": (ATTENTION_OUTPUT,), "full": ()}
    if remat != "none":
        policy = jax.checkpoint_policies.save_only_these_names(*names[remat])
        body = jax.checkpoint(body, policy=policy, prevent_cse=False)
    with jax.named_scope("blocks"):
        return jax.lax.scan(body, streams, params)


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
