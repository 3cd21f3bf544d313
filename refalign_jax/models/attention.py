"""Scaled dot-product attention behind two functions; the kernels are JAX's.

    attention(q, k, v)_i = Σ_j softmax_j(q_i·k_j / √K) v_j

    kernel   where                      padding          backward
    splash   TPU, Pallas                segment ids      recomputes scores tile by tile
    cudnn    NVIDIA, 16-bit             lengths          the same
    xla      anywhere, float32 too      lengths          scores of all tokens in memory

Padding is a suffix of the sequence. It is given as one length per sample, never as a mask of tokens by tokens.

On a mesh (Ulysses, arXiv 2309.14509), tokens are split over the context axis everywhere else, but no kernel takes a
split sequence. So an all-to-all exchanges queries, keys and values from some tokens of all heads to all tokens of some
heads, and another one exchanges the result back:

    [B, T/context, N/tensor, K]  ⇄  [B, T, N/(tensor·context), K]
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import PartitionSpec

from refalign_jax.config import AttentionKernel, AttentionTiles, DiTConfig
from refalign_jax.sharding import BATCH, CONDITION, CONTEXT, HIDDEN, context_parts
from refalign_jax.types import Array, Float, Int

ATTENTION_OUTPUT = "attention"
"""Checkpoint name of what a kernel returns: the output and, from splash, the log of the sums."""

CUDNN_FORWARD = "dot_product_attention_fwd_wrapper"
"""JAX's primitive for cuDNN's forward pass, whose log of the sums has no checkpoint name."""

LANES = 128
"""A TPU's vector width: tiles are multiples of it."""

_DEFAULT_TILES = AttentionTiles()


def self_attention(
    queries: tuple[Float[Array, "B _ N K"], ...],
    keys: tuple[Float[Array, "B _ N K"], ...],
    values: tuple[Float[Array, "B _ N K"], ...],
    sizes: tuple[int, ...],
    lengths: Int[Array, " B"] | None,
    config: DiTConfig,
) -> tuple[Float[Array, "B _ N K"], ...]:
    """Attends within a sequence that is stored as several streams, one after the other.

    Args:
      queries: rotated queries of each stream; on a mesh, tokens are split over the context axis.
      keys: rotated keys of each stream.
      values: values of each stream.
      sizes: number of tokens of each stream; the rest is padding to a multiple of the context axis, and ignored.
      lengths: number of tokens of each sample's sequence that are attended to, of `sum(sizes)`; None: all.
      config: names the kernel and its tiles.

    Returns:
      The attended values of each stream, in its shape; padding is 0.
    """
    padded = tuple(x.shape[1] for x in queries)
    parts = context_parts()

    def local(
        queries: tuple[Array, ...], keys: tuple[Array, ...], values: tuple[Array, ...], lengths: Array | None
    ) -> tuple[Array, ...]:
        def whole(streams: tuple[Array, ...]) -> Array:
            if parts > 1:
                streams = tuple(jax.lax.all_to_all(x, CONTEXT, 2, 1, tiled=True) for x in streams)
            return jnp.concatenate([x[:, :size] for x, size in zip(streams, sizes, strict=True)], axis=1)

        out = attention(whole(queries), whole(keys), whole(values), lengths, config.attention, config.tiles)
        bounds = itertools.pairwise(itertools.accumulate(sizes, initial=0))
        streams = tuple(
            jnp.pad(out[:, a:b], ((0, 0), (0, size - (b - a)), (0, 0), (0, 0)))
            for (a, b), size in zip(bounds, padded, strict=True)
        )
        if parts > 1:
            streams = tuple(jax.lax.all_to_all(x, CONTEXT, 1, 2, tiled=True) for x in streams)
        return streams

    if jax.sharding.get_abstract_mesh().empty:
        return local(queries, keys, values, lengths)
    specs = (HIDDEN, HIDDEN, HIDDEN, BATCH if lengths is not None else PartitionSpec())
    return jax.shard_map(local, in_specs=specs, out_specs=HIDDEN, check_vma=False)(queries, keys, values, lengths)


def cross_attention(
    q: Float[Array, "B L N K"],
    k: Float[Array, "B S N K"],
    v: Float[Array, "B S N K"],
    config: DiTConfig,
) -> Float[Array, "B L N K"]:
    """Attends from every query to all keys; on a mesh, each device attends from the queries that it holds.

    Args:
      q: queries; on a mesh, tokens are split over the context axis.
      k: keys; every device of the context axis holds all of them.
      v: values, placed as the keys.
      config: names the kernel and its tiles.
    """
    local = functools.partial(attention, kernel=config.attention, tiles=config.tiles)
    if jax.sharding.get_abstract_mesh().empty:
        return local(q, k, v)
    specs = (HIDDEN, CONDITION, CONDITION)
    return jax.shard_map(local, in_specs=specs, out_specs=HIDDEN, check_vma=False)(q, k, v)


def attention(
    q: Float[Array, "B Q N K"],
    k: Float[Array, "B T N K"],
    v: Float[Array, "B T N K"],
    lengths: Int[Array, " B"] | None = None,
    kernel: AttentionKernel = "auto",
    tiles: AttentionTiles = _DEFAULT_TILES,
) -> Float[Array, "B Q N K"]:
    """Attends from every query to the first `lengths` keys of its sample; all on one device.

    Args:
      q: queries.
      k: keys.
      v: values; those of padding must be finite, and have no effect.
      lengths: number of keys that are attended to in each sample; None: all.
      kernel: `splash` (TPU), `cudnn` (NVIDIA, 16-bit), `xla`, or `auto`, the fastest one on the platform.
      tiles: tile sizes of the splash kernel.

    Returns:
      The attended values in q's dtype; softmax runs in float32.
    """
    if kernel == "auto":
        kernel = _fast_kernel(q.dtype)
    if kernel == "splash":
        return _splash(q, k, v, lengths, tiles)
    exact = jax.default_matmul_precision("highest") if q.dtype == jnp.float32 else contextlib.nullcontext()
    with exact:
        fused: Literal["xla", "cudnn"] = "cudnn" if kernel == "cudnn" else "xla"
        out = jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths, implementation=fused)
    return out if kernel == "cudnn" else checkpoint_name(out, ATTENTION_OUTPUT)  # cuDNN's is named by its primitive


def _fast_kernel(dtype: jnp.dtype) -> AttentionKernel:
    """The fastest kernel on the platform of the ambient mesh's devices or, without a mesh, of the default devices."""
    mesh = jax.sharding.get_abstract_mesh()
    platform = jax.default_backend() if mesh.empty else mesh.abstract_device.platform
    if dtype == jnp.float32:
        return "xla"
    return {"tpu": "splash", "gpu": "cudnn", "cuda": "cudnn"}.get(platform, "xla")  # type: ignore[return-value]


def _splash(q: Array, k: Array, v: Array, lengths: Array | None, tiles: AttentionTiles) -> Array:
    """JAX's splash attention, a sample at a time, on sequences padded to whole tiles."""
    (B, Q, N, K), T = q.shape, k.shape[1]
    padded_q, padded_kv = padded_length(Q, tiles.q, tiles.backward_q), padded_length(T, tiles.kv, tiles.backward_kv)
    backward_q, backward_kv = min(tiles.backward_q, padded_q), min(tiles.backward_kv, padded_kv)
    blocks = splash.BlockSizes(
        block_q=min(tiles.q, padded_q),
        block_kv=min(tiles.kv, padded_kv),
        block_kv_compute=min(tiles.kv_compute, padded_kv),
        block_q_dkv=backward_q,
        block_kv_dkv=backward_kv,
        block_kv_dkv_compute=min(tiles.backward_kv_compute, padded_kv),
        block_q_dq=None if tiles.fused_backward else backward_q,
        block_kv_dq=None if tiles.fused_backward else backward_kv,
        use_fused_bwd_kernel=tiles.fused_backward,
    )
    attend = splash.make_splash_mha(
        splash.MultiHeadMask([splash.FullMask((padded_q, padded_kv))] * N),
        block_sizes=blocks,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=ATTENTION_OUTPUT,
        interpret=_fast_kernel(jnp.dtype(jnp.bfloat16)) != "splash",
    )

    def heads_first(x: Array, size: int) -> Array:
        return jnp.pad(x, ((0, 0), (0, size - x.shape[1]), (0, 0), (0, 0))).swapaxes(1, 2)

    # Attention is within segments: segment 0 has all queries and the real keys, segment 1 the padding keys.
    segments = None
    if lengths is not None or padded_kv != T:
        ends = jnp.full((B,), T) if lengths is None else lengths
        hidden = (jnp.arange(padded_kv) >= ends[:, None]).astype(jnp.int32)
        segments = splash.SegmentIds(q=jnp.zeros((B, padded_q), jnp.int32), kv=hidden)
    scaled = (q.astype(jnp.float32) * K**-0.5).astype(q.dtype)
    out = jax.vmap(attend)(
        heads_first(scaled, padded_q), heads_first(k, padded_kv), heads_first(v, padded_kv), segments
    )
    return out.swapaxes(1, 2)[:, :Q].astype(q.dtype)


def padded_length(tokens: int, *tiles: int) -> int:
    """Length of a sequence padded to whole tiles: a multiple of the largest tile, or a power of two if that is less."""
    unit = min(max(tiles), max(LANES, 1 << (tokens - 1).bit_length()))
    return -(-tokens // unit) * unit
