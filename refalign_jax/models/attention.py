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

The heads limit context times tensor. Beyond that, the ring axis splits the tokens further (`ring`): each of its devices
keeps its part of the tokens, and keys and values pass by in turn.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from refalign_jax.config import AttentionKernel, AttentionTiles, DiTConfig
from refalign_jax.models.ring import Ring, ring_attention
from refalign_jax.models.splash import ATTENTION_OUTPUT, heads_first, segments_of, splash_kernel
from refalign_jax.sharding import BATCH, CONDITION, CONTEXT, HIDDEN, RING, ambient_device, axis_size
from refalign_jax.types import Array, Float, Int

CUDNN_FORWARD = "dot_product_attention_fwd_wrapper"
"""JAX's primitive for cuDNN's forward pass, whose log of the sums has no checkpoint name."""

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
    context, ring = axis_size(CONTEXT), axis_size(RING)

    def local(
        queries: tuple[Array, ...], keys: tuple[Array, ...], values: tuple[Array, ...], lengths: Array | None
    ) -> tuple[Array, ...]:
        def gather(streams: tuple[Array, ...]) -> tuple[Array, ...]:
            return streams if context == 1 else tuple(_exchange(x, 2, 1) for x in streams)

        q, k, v = gather(queries), gather(keys), gather(values)
        if ring == 1:
            joined = _join(q, sizes), _join(k, sizes), _join(v, sizes)
            out = attention(*joined, lengths, config.attention, config.tiles)
            ends = sizes
        else:
            ends = tuple(x.shape[1] for x in q)
            out = _ring(q, k, v, (sizes, lengths), config)
        streams = _split(out, ends, tuple(x.shape[1] for x in q))
        return streams if context == 1 else tuple(_exchange(x, 1, 2) for x in streams)

    if jax.sharding.get_abstract_mesh().empty:
        return local(queries, keys, values, lengths)
    specs = (HIDDEN, HIDDEN, HIDDEN, BATCH if lengths is not None else PartitionSpec())
    return jax.shard_map(local, in_specs=specs, out_specs=HIDDEN, check_vma=False)(queries, keys, values, lengths)


def _exchange(x: Float[Array, "B T N K"], split: int, concat: int) -> Float[Array, "B _ _ K"]:
    """Exchanges tokens for heads over the context axis, or back."""
    return jax.lax.all_to_all(x, CONTEXT, split, concat, tiled=True)


def _join(streams: tuple[Array, ...], sizes: tuple[int, ...]) -> Float[Array, "B T N K"]:
    """One sequence of the streams' first `sizes` tokens."""
    return jnp.concatenate([x[:, :size] for x, size in zip(streams, sizes, strict=True)], axis=1)


def _split(x: Float[Array, "B T N K"], sizes: tuple[int, ...], padded: tuple[int, ...]) -> tuple[Array, ...]:
    """Splits a sequence into streams of `sizes` tokens and pads each with zeros."""
    bounds = itertools.pairwise(itertools.accumulate(sizes, initial=0))
    return tuple(
        jnp.pad(x[:, a:b], ((0, 0), (0, size - (b - a)), (0, 0), (0, 0)))
        for (a, b), size in zip(bounds, padded, strict=True)
    )


def _ring(
    queries: tuple[Array, ...],
    keys: tuple[Array, ...],
    values: tuple[Array, ...],
    real: tuple[tuple[int, ...], Array | None],
    config: DiTConfig,
) -> Float[Array, "B T N K"]:
    """Ring attention of streams of which every device of the ring axis holds an equal part; within `shard_map`.

    Args:
      queries: of each stream, this device's part.
      keys: likewise.
      values: likewise.
      real: number of tokens of each whole stream without padding; number of attended tokens of each sample, or None.
      config: names the kernel and its tiles.

    Returns:
      The streams one after the other, padding included, which is 0.
    """
    sizes, lengths = real
    parts, ring = tuple(x.shape[1] for x in keys), axis_size(RING)
    place = jax.lax.axis_index(RING)
    starts = list(itertools.accumulate(sizes, initial=0))
    lengths = jnp.full(queries[0].shape[0], starts[-1]) if lengths is None else lengths

    def attended(device: Array, stream: int) -> Int[Array, "*device B"]:
        """How many tokens of a device's part of a stream are attended to."""
        whole = jnp.clip(lengths - starts[stream], 0, sizes[stream])
        return jnp.clip(whole - device[..., None] * parts[stream], 0, parts[stream])

    def packed(streams: tuple[Array, ...]) -> Array:
        """The streams' real tokens one after the other, so that padding is a suffix."""
        out = jnp.concatenate([streams[0], *(jnp.zeros_like(x) for x in streams[1:])], axis=1)
        end = jnp.clip(sizes[0] - place * parts[0], 0, parts[0])
        for stream, x in enumerate(streams[1:], start=1):
            out = jax.lax.dynamic_update_slice_in_dim(out, x, end, axis=1)
            end = end + jnp.clip(sizes[stream] - place * parts[stream], 0, parts[stream])
        return out

    devices = jnp.arange(ring)
    counts = sum((attended(devices, stream) for stream in range(len(sizes))), jnp.zeros((), jnp.int32))
    kernel = _fast_kernel(queries[0].dtype) if config.attention == "auto" else config.attention
    assert kernel != "cudnn", "checked by sharding.check_heads"
    how = Ring(axis=RING, kernel=kernel, tiles=config.tiles)
    out = ring_attention(jnp.concatenate(queries, axis=1), packed(keys), packed(values), counts, how)
    shown = jnp.concatenate([jnp.arange(part) < size - place * part for part, size in zip(parts, sizes, strict=True)])
    return jnp.where(shown[:, None, None], out, 0)


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
    if kernel == "cudnn" and (q.shape[1] % 2 or k.shape[1] % 2):
        return _even_cudnn(q, k, v, lengths)
    exact = jax.default_matmul_precision("highest") if q.dtype == jnp.float32 else contextlib.nullcontext()
    with exact:
        fused: Literal["xla", "cudnn"] = "cudnn" if kernel == "cudnn" else "xla"
        out = jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths, implementation=fused)
    return out if kernel == "cudnn" else checkpoint_name(out, ATTENTION_OUTPUT)  # cuDNN's is named by its primitive


def _even_cudnn(q: Array, k: Array, v: Array, lengths: Array | None) -> Float[Array, "B Q N K"]:
    """cuDNN's attention of odd numbers of tokens, whose gradient it refuses: with a token of padding behind them."""
    lengths = jnp.full(k.shape[0], k.shape[1]) if lengths is None else lengths
    even_q, even_k, even_v = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (q, k, v))
    return attention(even_q, even_k, even_v, lengths, "cudnn")[:, : q.shape[1]]


def _fast_kernel(dtype: jnp.dtype) -> AttentionKernel:
    """The fastest kernel on the ambient device's platform."""
    platform = ambient_device().platform
    if dtype == jnp.float32:
        return "xla"
    return {"tpu": "splash", "gpu": "cudnn", "cuda": "cudnn"}.get(platform, "xla")  # type: ignore[return-value]


def _splash(q: Array, k: Array, v: Array, lengths: Array | None, tiles: AttentionTiles) -> Array:
    """JAX's splash attention, a sample at a time, on sequences padded to whole tiles."""
    (B, Q, _, K), T = q.shape, k.shape[1]
    attend, (padded_q, padded_kv) = splash_kernel(q, k, tiles, save_residuals=False)
    segments = None
    if lengths is not None or padded_kv != T:
        segments = segments_of(T if lengths is None else lengths, B, padded_q, padded_kv)
    scaled = (q.astype(jnp.float32) * K**-0.5).astype(q.dtype)
    out = jax.vmap(attend)(
        heads_first(scaled, padded_q), heads_first(k, padded_kv), heads_first(v, padded_kv), segments
    )
    return out.swapaxes(1, 2)[:, :Q].astype(q.dtype)
