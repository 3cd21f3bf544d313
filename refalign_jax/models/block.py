"""One block of the Wan2.1 transformer, and its head, as linen modules.

    x += gate₁ · SelfAttention(LN(x)·(1 + scale₁) + shift₁)      video and reference tokens together
    x += CrossAttention(LN_affine(x), text)                      video tokens only; in Phantom-Wan references too
    x += gate₂ · FFN(LN(x)·(1 + scale₂) + shift₂)                each token by itself

Video and reference tokens are two arrays, called streams, that meet in self-attention alone. So nothing is cut out of a
longer sequence, and on a mesh each stream is split evenly by itself, padded where its tokens don't divide.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from refalign_jax.config import DiTConfig
from refalign_jax.models.attention import cross_attention, self_attention
from refalign_jax.models.layers import HIDDEN_OUTPUT, Linear, RMSNorm, layer_norm
from refalign_jax.models.rope import Rotation, rotate
from refalign_jax.sharding import CONDITION, HIDDEN, TOKENS, constrain
from refalign_jax.types import Array, Float, Int

Streams = tuple[Float[Array, "B _ D"], ...]
"""(video tokens [B, L, D],) or (video tokens [B, L, D], reference tokens [B, R·P, D]), and padding behind each."""

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
    """

    time: Float[Array, "B 6 D"]
    text: Float[Array, "B S D"]
    rotations: tuple[Rotation, ...]
    sizes: tuple[int, ...]
    lengths: Int[Array, " B"] | None


class SelfAttention(nn.Module):
    """Attention of all tokens to all tokens; queries and keys RMS-normalised over D, then rotated."""

    config: DiTConfig

    @nn.compact
    def __call__(self, streams: Streams, shared: Shared) -> Streams:
        """Maps normalised tokens to attended tokens, shapes kept."""
        c = self.config
        dtype = jnp.dtype(c.compute_dtype)
        query, key, value = (Linear(c.width, dtype, HIDDEN, name=name) for name in ("query", "key", "value"))
        query_norm, key_norm = (RMSNorm(c.eps, name=name) for name in ("query_norm", "key_norm"))
        turned = tuple(zip(streams, shared.rotations, strict=True))
        attended = self_attention(
            tuple(rotate(_heads(query_norm(query(x)), c), turn) for x, turn in turned),
            tuple(rotate(_heads(key_norm(key(x)), c), turn) for x, turn in turned),
            tuple(_heads(value(x), c) for x in streams),
            shared.sizes,
            shared.lengths,
            c,
        )
        out = Linear(c.width, dtype, name="out")
        return tuple(out(_merge(x)) for x in attended)


class CrossAttention(nn.Module):
    """Attention of tokens to the text; queries and keys RMS-normalised over D."""

    config: DiTConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"], text: Float[Array, "B S D"]) -> Float[Array, "B L D"]:
        """Returns the attended tokens."""
        c = self.config
        dtype = jnp.dtype(c.compute_dtype)
        query = Linear(c.width, dtype, HIDDEN, name="query")
        key, value = (Linear(c.width, dtype, CONDITION, name=name) for name in ("key", "value"))
        q = _heads(RMSNorm(c.eps, name="query_norm")(query(x)), c)
        k = _heads(RMSNorm(c.eps, name="key_norm")(key(text)), c)
        attended = cross_attention(q, k, _heads(value(text), c), c)
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
    def __call__(self, streams: Streams, shared: Shared) -> Streams:
        """Maps the streams, in the residual dtype, to the streams after this block."""
        c = self.config
        dtype = jnp.dtype(c.compute_dtype)
        streams = tuple(checkpoint_name(constrain(x, TOKENS), BLOCK_INPUT) for x in streams)
        modulation = self.param("modulation", nn.initializers.normal(c.width**-0.5), (6, c.width))
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(
            (shared.time + modulation).astype(jnp.float32), 6, axis=1
        )

        inputs = tuple(_modulate(x, shift1, scale1, c.eps).astype(dtype) for x in streams)
        outputs = SelfAttention(c, name="self_attention")(inputs, shared)
        video, *reference = (_gated(x, gate1, y) for x, y in zip(streams, outputs, strict=True))

        norm = nn.LayerNorm(c.eps, use_fast_variance=False, dtype=jnp.float32, name="cross_norm")
        cross_attention = CrossAttention(c, name="cross_attention")

        def cross(x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
            return (x + cross_attention(norm(x).astype(dtype), shared.text)).astype(x.dtype)

        video = cross(video)
        if c.reference_cross_attention:
            reference = [cross(x) for x in reference]

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
