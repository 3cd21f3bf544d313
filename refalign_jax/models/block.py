"""One block of the Wan2.1 transformer, and its head, as linen modules.

    x += gate₁ · SelfAttention(LN(x)·(1 + scale₁) + shift₁)      video and reference tokens together
    x += CrossAttention(LN_affine(x), text)                      video tokens only; in Phantom-Wan references too
    x += gate₂ · FFN(LN(x)·(1 + scale₂) + shift₂)                each token by itself

Where a mesh splits the tokens, video and reference tokens are two arrays, called streams, that meet in self-attention
alone. So nothing is cut out of a longer sequence, and each stream is split evenly by itself, padded where its tokens
don't divide. On one device, and on GPUs whose mesh does not split the tokens, they are one stream, so that each
operation and each kernel's gradient is computed once. Meshes of TPUs keep two: in one stream, RefAlign-1.3B's tokens
become large enough for the compiler to cut products with split kernels into windows, each of which reads them again.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from refalign_jax.config import DiTConfig
from refalign_jax.models.attention import cross_attention, self_attention
from refalign_jax.models.gradients import (
    Modulation,
    Product,
    add_gated,
    by_token,
    modulated_norm,
    modulated_products,
    rms_norm,
    stored,
    stored_gradient,
)
from refalign_jax.models.layers import HIDDEN_OUTPUT, LINEAR_OUTPUT, Linear, LinearParams
from refalign_jax.models.rope import Rotation
from refalign_jax.sharding import CONDITION, HIDDEN, TOKENS, constrain
from refalign_jax.types import Array, Float, Int

Streams = tuple[Float[Array, "B _ D"], ...]
"""(video tokens [B, L, D],) or (video tokens [B, L, D], reference tokens [B, R·P, D]), and padding behind each; or
both in one, (tokens [B, L + R·P, D],)."""

BLOCK_INPUT = "block_input"
"""Checkpoint name of a block's input, which can be offloaded to the host's memory."""


class Shared(NamedTuple):
    """What every block reads beside the streams.

    Attributes:
      time: projected time embedding, float32: shift, scale and gate of attention, then of the feed-forward network.
      text: embedded text, in the compute dtype.
      rotations: rotary cosines and sines of each stream.
      sizes: number of tokens of each stream without the padding behind it.
      lengths: number of tokens of each sample that are not padded references; None: all.
      video: number of video tokens, where references follow them in the same stream; None: each has its own.
    """

    time: Float[Array, "B 6 D"]
    text: Float[Array, "B S D"]
    rotations: tuple[Rotation, ...]
    sizes: tuple[int, ...]
    lengths: Int[Array, " B"] | None
    video: int | None = None


class HeadsNorm(nn.Module):
    """Queries or keys RMS-normalised over all heads together, and rotated."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "B T N K"], turn: Rotation | None = None) -> Float[Array, "B T N K"]:
        """Returns x normalised and, if `turn` is given, rotated; in x's dtype."""
        N, K = x.shape[2:]
        scale = self.param("scale", nn.initializers.ones, (N * K,))
        return rms_norm(x, scale.reshape(N, K), turn, self.eps)


class NormParams(nn.Module):
    """The scale and bias of a layer norm."""

    @nn.compact
    def __call__(self, width: int) -> Modulation:
        """Returns both as [1, 1, width]."""
        scale = self.param("scale", nn.initializers.ones, (width,))
        return scale[None, None], self.param("bias", nn.initializers.zeros, (width,))[None, None]


class SelfAttention(nn.Module):
    """Attention of all tokens to all tokens; queries and keys RMS-normalised over D, then rotated."""

    config: DiTConfig

    @nn.compact
    def __call__(self, streams: Streams, modulation: Modulation, shared: Shared) -> tuple[Product, ...]:
        """Maps tokens, which are normalised and modulated here, to what attention adds to each stream."""
        c = self.config
        dtype = jnp.dtype(c.compute_dtype)
        query, key, value = (LinearParams(c.width, dtype, name=name)(c.width) for name in ("query", "key", "value"))
        query_norm, key_norm = (HeadsNorm(c.eps, name=name) for name in ("query_norm", "key_norm"))
        queries, keys, values, constants = [], [], [], []
        for x, turn in zip(streams, shared.rotations, strict=True):
            q, k, (v, constant) = modulated_products(x, modulation, (query, key, value), c.eps)
            queries.append(query_norm(_heads(_kept(*q), c), turn))
            keys.append(key_norm(_heads(_kept(*k), c), turn))
            values.append(_heads(_kept(v), c))
            constants.append(constant)
        attended = self_attention(tuple(queries), tuple(keys), tuple(values), shared.sizes, shared.lengths, c)
        kernel, bias = LinearParams(c.width, dtype, name="out")(c.width)
        # The weights of attention sum to 1, so what all values have in common is added behind it.
        return tuple(Product(_merge(x), kernel, bias, common=constants[0]) for x in attended)


class CrossAttention(nn.Module):
    """Attention of tokens to the text; queries and keys RMS-normalised over D."""

    config: DiTConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], modulation: Modulation, text: Float[Array, "B S D"], number: int | None = None
    ) -> Float[Array, "B L D"]:
        """Maps the first `number` tokens, which are normalised and modulated here, to attended ones; None: all."""
        c = self.config
        dtype = jnp.dtype(c.compute_dtype)
        kernel = LinearParams(c.width, dtype, name="query")(c.width)
        (query,) = modulated_products(x, modulation, (kernel,), c.eps, number)
        key, value = (Linear(c.width, dtype, CONDITION, name=name) for name in ("key", "value"))
        q = HeadsNorm(c.eps, name="query_norm")(_heads(_kept(*query), c))
        k = HeadsNorm(c.eps, name="key_norm")(_heads(key(text), c))
        attended = cross_attention(q, k, _heads(value(text), c), c)
        return Linear(c.width, dtype, name="out")(_merge(attended))


class FeedForward(nn.Module):
    """Linear, GELU (tanh), Linear, behind a modulated norm."""

    config: DiTConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], modulation: Modulation) -> Product:
        """Maps tokens, which are normalised and modulated here, to what is added to them."""
        c = self.config
        dtype = jnp.dtype(c.compute_dtype)
        (y,) = modulated_products(x, modulation, (LinearParams(c.ffn_width, dtype, name="in")(c.width),), c.eps)
        kernel, bias = LinearParams(c.width, dtype, name="out")(c.ffn_width)
        hidden, constant = y
        return Product(_kept(hidden, name=HIDDEN_OUTPUT), kernel, bias, inner=constant)


class Block(nn.Module):
    """One transformer block."""

    config: DiTConfig

    @nn.compact
    def __call__(self, streams: Streams, shared: Shared) -> Streams:
        """Maps the streams, in the residual dtype, to the streams after this block."""
        c = self.config
        streams = tuple(checkpoint_name(by_token(constrain(x, TOKENS)), BLOCK_INPUT) for x in streams)
        modulation = self.param("modulation", nn.initializers.normal(c.width**-0.5), (6, c.width))
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(
            (shared.time + modulation).astype(jnp.float32), 6, axis=1
        )

        outputs = SelfAttention(c, name="self_attention")(streams, (1 + scale1, shift1), shared)
        video, *reference = (stored_gradient(add_gated(x, gate1, y)) for x, y in zip(streams, outputs, strict=True))

        norm = NormParams(name="cross_norm")(c.width)
        cross_attention = CrossAttention(c, name="cross_attention")

        if c.reference_cross_attention:
            video, *reference = (
                (x + cross_attention(x, norm, shared.text)).astype(x.dtype) for x in (video, *reference)
            )
        else:
            added = cross_attention(video, norm, shared.text, shared.video)
            behind = video.shape[1] - added.shape[1]
            video = (video + jnp.pad(added, ((0, 0), (0, behind), (0, 0)))).astype(video.dtype)
        video, *reference = (stored(x) for x in (video, *reference))

        ffn = FeedForward(c, name="ffn")
        return tuple(add_gated(x, gate2, ffn(x, (1 + scale2, shift2))) for x in (video, *reference))


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
        return linear(modulated_norm(x, 1 + scale, shift, c.eps))


def _heads(x: Float[Array, "B T D"], config: DiTConfig) -> Float[Array, "B T N K"]:
    return x.reshape(*x.shape[:2], config.num_heads, config.head_width)


def _merge(x: Float[Array, "B T N K"]) -> Float[Array, "B T D"]:
    return x.reshape(*x.shape[:2], -1)


def _kept(
    x: Float[Array, "B T O"], constant: Float[Array, "#B 1 O"] | None = None, name: str = LINEAR_OUTPUT
) -> Float[Array, "B T O"]:
    """The output of a linear layer plus its constant, placed on the mesh and named for activation checkpointing."""
    x = constrain(x, HIDDEN)
    return checkpoint_name(x if constant is None else x + constant.astype(x.dtype), name)
