"""JAX's splash attention for sequences of any length: tiles, padding, segments."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from refalign_jax.config import AttentionTiles
from refalign_jax.devices import GIB, chip
from refalign_jax.sharding import ambient_device
from refalign_jax.types import Array, Float, Int

ATTENTION_OUTPUT = "attention"
"""Checkpoint name of what a kernel returns: the output and, from splash, the log of the sums."""

LANES = 128
"""A TPU's vector width: tiles are multiples of it."""


def splash_kernel(
    q: Float[Array, "B Q N K"], k: Float[Array, "B T N K"], tiles: AttentionTiles, *, save_residuals: bool
) -> tuple[Any, tuple[int, int]]:
    """Makes the kernel for one sample, from [N, Q, K], [N, T, K], [N, T, K] and segments.

    Args:
      q: queries.
      k: keys.
      tiles: tile sizes.
      save_residuals: whether it returns the log of the sums too; it can't be differentiated then.

    Returns:
      The kernel, and the numbers of queries and keys that it is for: whole tiles.
    """
    (_, Q, N, _), T = q.shape, k.shape[1]
    kind = str(ambient_device().device_kind)
    backward_kv = tiles.backward_kv or backward_tile(q.size * q.dtype.itemsize, T, kind)
    padded_q, padded_kv = padded_length(Q, tiles.q, tiles.backward_q), padded_length(T, tiles.kv, backward_kv)
    backward_q, backward_kv = min(tiles.backward_q, padded_q), min(backward_kv, padded_kv)
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
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([splash.FullMask((padded_q, padded_kv))] * N),
        block_sizes=blocks,
        head_shards=1,
        q_seq_shards=1,
        save_residuals=save_residuals,
        residual_checkpoint_name=ATTENTION_OUTPUT,
        interpret=ambient_device().platform != "tpu",
    )
    return kernel, (padded_q, padded_kv)


def heads_first(x: Float[Array, "B T N K"], size: int) -> Float[Array, "B N size K"]:
    """Pads tokens with zeros and puts heads before them."""
    return jnp.pad(x, ((0, 0), (0, size - x.shape[1]), (0, 0), (0, 0))).swapaxes(1, 2)


def segments_of(count: Int[Array, " B"] | int, samples: int, queries: int, keys: int) -> splash.SegmentIds:
    """Segments in which attention stays: segment 0 has all queries and the real keys, segment 1 the padding keys.

    Args:
      count: number of real keys, of each sample or of all.
      samples: B.
      queries: number of queries, with padding.
      keys: number of keys, with padding.
    """
    ends = jnp.broadcast_to(jnp.asarray(count), (samples,))
    hidden = (jnp.arange(keys) >= ends[:, None]).astype(jnp.int32)
    return splash.SegmentIds(q=jnp.zeros((samples, queries), jnp.int32), kv=hidden)


def backward_tile(query_bytes: int, tokens: int, device_kind: str) -> int:
    """Returns `AttentionTiles.backward_kv` for a device.

    The fused backward kernel writes a partial query gradient for every tile of keys. The tile is doubled where these
    would take more than a sixth of the device's memory.

    Args:
      query_bytes: size of the queries on one device.
      tokens: number of keys.
      device_kind: as JAX names the device; devices that `devices.CHIPS` doesn't have are taken to have enough memory.
    """
    known = chip(device_kind)
    partial = query_bytes * -(-tokens // 1024)
    return 2048 if known is not None and partial > known.hbm_gib * GIB / 6 else 1024


def padded_length(tokens: int, *tiles: int) -> int:
    """Length of a sequence padded to whole tiles: a multiple of the largest tile, or a power of two if that is less."""
    unit = min(max(tiles), max(LANES, 1 << (tokens - 1).bit_length()))
    return -(-tokens // unit) * unit
