"""Ring attention: every device holds some queries, and the keys and values pass by all of them in turn.

With the keys split into blocks j, of which each device holds one, and o_j, ℓ_j the output and the log of the sum of
exponentials of attention to block j alone,

    ℓ = log Σ_j exp(ℓ_j),   o = Σ_j exp(ℓ_j − ℓ) o_j.

A device computes o_j for the block that it holds and hands the block on, so that no device ever holds all keys. In the
backward pass, the blocks go round again with their gradients. A block's gradient is what the kernel's own backward pass
computes when it is given ℓ and o of the whole sequence, since exp(q·k_j/√K − ℓ) are the probabilities over all keys.

Attention within a block is JAX's splash kernel or plain XLA. Splash has no public function for the gradient with given
ℓ and o; the private one that its own gradient calls is used (`_splash_gradients`), the same in jax 0.10 to 0.12.

Source: Liu et al. 2023 (arXiv 2310.01889).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

from refalign_jax.config import AttentionTiles
from refalign_jax.models.splash import ATTENTION_OUTPUT, heads_first, segments_of, splash_kernel
from refalign_jax.types import Array, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ring:
    """How a ring is computed.

    Attributes:
      axis: name of the mesh axis.
      kernel: of attention within a block, `splash` or `xla`.
      tiles: tile sizes of splash.
    """

    axis: str
    kernel: str
    tiles: AttentionTiles


class Block(NamedTuple):
    """Keys and values of one device, and the number of keys that are attended to in each sample, the first ones."""

    k: Float[Array, "B T N K"]
    v: Float[Array, "B T N K"]
    number: Int[Array, " B"]


class Attended(NamedTuple):
    """Queries of one device, output and ℓ over all keys, and the gradient with the output."""

    q: Float[Array, "B Q N K"]
    out: Float[Array, "B Q N K"]
    log_sum: Float[Array, "B N Q"]
    gradient: Float[Array, "B Q N K"]


Gradients = tuple[Float[Array, "B Q N K"], Float[Array, "B T N K"], Float[Array, "B T N K"]]
"""With queries, keys and values, float32."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def ring_attention(
    q: Float[Array, "B Q N K"],
    k: Float[Array, "B T N K"],
    v: Float[Array, "B T N K"],
    counts: Int[Array, "ring B"],
    ring: Ring,
) -> Float[Array, "B Q N K"]:
    """Attends from the queries of this device to the keys of all devices of a mesh axis; within `shard_map`.

    Args:
      q: queries of this device.
      k: its block of keys.
      v: its block of values.
      counts: number of keys that are attended to in every block, the first ones of it; the same on all devices.
      ring: the mesh axis and the kernel.

    Returns:
      The attended values in q's dtype; softmax runs in float32.
    """
    return _forward(q, k, v, counts, ring)[0]


def _forward(q: Array, k: Array, v: Array, counts: Array, ring: Ring) -> tuple[Array, tuple[Array, ...]]:
    """The output, and what the backward pass needs."""
    size, place = jax.lax.axis_size(ring.axis), jax.lax.axis_index(ring.axis)

    def step(carry: Any, i: Array) -> tuple[Any, None]:
        k, v, out, total = carry
        k, v = _hand_on((k, v), ring.axis)
        new, log_sum = _attend(q, Block(k, v, counts[(place - i) % size]), ring)
        merged = jnp.logaddexp(total, log_sum)
        out = out * _weight(total, merged) + new * _weight(log_sum, merged)
        return (k, v, out, merged), None

    first = (k, v, *_attend(q, Block(k, v, counts[place]), ring))
    (_, _, out, total), _ = jax.lax.scan(step, first, jnp.arange(1, size))
    out, total = (checkpoint_name(x, ATTENTION_OUTPUT) for x in (out.astype(q.dtype), total))
    return out, (q, k, v, counts, out, total)


def _backward(ring: Ring, kept: tuple[Array, ...], gradient: Array) -> tuple[Array | None, ...]:
    """Gradients with the queries, keys and values of this device."""
    q, k, v, counts, out, total = kept
    size, place = jax.lax.axis_size(ring.axis), jax.lax.axis_index(ring.axis)
    attended = Attended(q, out, total, gradient)

    def step(carry: Any, i: Array) -> tuple[Any, None]:
        k, v, dk, dv, dq = carry
        k, v, dk, dv = _hand_on((k, v, dk, dv), ring.axis)
        more = _gradients(attended, Block(k, v, counts[(place - i) % size]), ring)
        return (k, v, dk + more[1], dv + more[2], dq + more[0]), None

    dq, dk, dv = _gradients(attended, Block(k, v, counts[place]), ring)
    (_, _, dk, dv, dq), _ = jax.lax.scan(step, (k, v, dk, dv, dq), jnp.arange(1, size))
    dk, dv = _hand_on((dk, dv), ring.axis)  # back to where the block belongs
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


ring_attention.defvjp(_forward, _backward)


def _hand_on(blocks: tuple[Array, ...], axis: str) -> tuple[Array, ...]:
    """Sends every device's blocks to the next one."""
    size = jax.lax.axis_size(axis)
    return tuple(jax.lax.ppermute(x, axis, [(i, (i + 1) % size) for i in range(size)]) for x in blocks)


def _weight(log_sum: Float[Array, "B N Q"], total: Float[Array, "B N Q"]) -> Float[Array, "B Q N 1"]:
    """The share of a block in the whole, exp(ℓ_j − ℓ); 0 for a block without keys."""
    return jnp.exp(log_sum - total).swapaxes(1, 2)[..., None]


def _attend(
    q: Float[Array, "B Q N K"], block: Block, ring: Ring
) -> tuple[Float[Array, "B Q N K"], Float[Array, "B N Q"]]:
    """Output and ℓ of attention to one block, float32; of a block without keys, 0 and a very small number."""
    if ring.kernel == "splash":
        out, log_sum = _splash_attend(q, block, ring.tiles)
    else:
        scores = _scores(q, block)
        log_sum = jax.nn.logsumexp(scores, axis=-1)
        weights = jnp.exp(scores - log_sum[..., None])
        out = jnp.einsum("bnqt,btnk->bqnk", weights, block.v.astype(jnp.float32), precision="highest")
    some = block.number > 0
    return jnp.where(some[:, None, None, None], out, 0), jnp.where(some[:, None, None], log_sum, -1e30)


def _gradients(attended: Attended, block: Block, ring: Ring) -> Gradients:
    """Gradients of attention to one block, given ℓ and the output over all blocks."""
    if ring.kernel == "splash":
        return _splash_gradients(attended, block, ring.tiles)
    q, out, gradient = (x.astype(jnp.float32) for x in (attended.q, attended.out, attended.gradient))
    k, v = block.k.astype(jnp.float32), block.v.astype(jnp.float32)
    product = functools.partial(jnp.einsum, precision="highest")
    weights = jnp.exp(_scores(q, block) - attended.log_sum[..., None])
    rest = jnp.sum(out * gradient, axis=-1).swapaxes(1, 2)[..., None]
    ds = weights * (product("bqnk,btnk->bnqt", gradient, v) - rest) * q.shape[-1] ** -0.5
    dv = product("bnqt,bqnk->btnk", weights, gradient)
    return product("bnqt,btnk->bqnk", ds, k), product("bnqt,bqnk->btnk", ds, q), dv


def _scores(q: Float[Array, "B Q N K"], block: Block) -> Float[Array, "B N Q T"]:
    """q·k/√K, float32; a very small number where a key is not attended to."""
    product = jnp.einsum("bqnk,btnk->bnqt", q.astype(jnp.float32), block.k.astype(jnp.float32), precision="highest")
    hidden = jnp.arange(block.k.shape[1]) >= block.number[:, None]
    return jnp.where(hidden[:, None, None], -1e30, product * q.shape[-1] ** -0.5)


def _splash_attend(q: Array, block: Block, tiles: AttentionTiles) -> tuple[Array, Array]:
    """Output and ℓ by the splash kernel."""
    attend, sizes = splash_kernel(q, block.k, tiles, save_residuals=True)
    segments = segments_of(block.number, q.shape[0], *sizes)
    scaled = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)
    out, (log_sum,) = jax.vmap(attend)(
        heads_first(scaled, sizes[0]), heads_first(block.k, sizes[1]), heads_first(block.v, sizes[1]), segments
    )
    return out.swapaxes(1, 2)[:, : q.shape[1]].astype(jnp.float32), log_sum[..., : q.shape[1]]


_OPTIONS = (
    "save_residuals",
    "mask_value",
    "is_mqa",
    "block_sizes",
    "residual_checkpoint_name",
    "mask_function",
    "attn_logits_soft_cap",
    "interpret",
)
"""Options of a splash kernel that its gradient takes, in its order."""


def _splash_gradients(attended: Attended, block: Block, tiles: AttentionTiles) -> Gradients:
    """Gradients by the splash kernel's backward kernel."""
    (B, Q, _, K), T = attended.q.shape, block.k.shape[1]
    kernel, sizes = splash_kernel(attended.q, block.k, tiles, save_residuals=False)
    options = [kernel.kwargs[name] for name in _OPTIONS]
    backward: Any = splash_attention_kernel._splash_attention_bwd
    scaled = (attended.q.astype(jnp.float32) * K**-0.5).astype(attended.q.dtype)
    inputs = (
        heads_first(scaled, sizes[0]),
        heads_first(block.k, sizes[1]),
        heads_first(block.v, sizes[1]),
        segments_of(block.number, B, *sizes),
        None,
        heads_first(attended.out, sizes[0]),
        # padded queries get a probability of 0: exp(score - ℓ) with a large ℓ
        jnp.pad(attended.log_sum, ((0, 0), (0, 0), (0, sizes[0] - Q)), constant_values=1e30),
    )

    def one(inputs: Any, gradient: Array) -> tuple[Array, Array, Array]:
        kept = (*inputs, kernel.dq_mask_info, kernel.dkv_mask_info)
        dq, dk, dv = backward(*options, kept, gradient)[3:6]
        return dq, dk, dv

    found = jax.vmap(one)(inputs, heads_first(attended.gradient, sizes[0]))
    dq, dk, dv = (x.swapaxes(1, 2).astype(jnp.float32) for x in found)
    return dq[:, :Q] * K**-0.5, dk[:, :T], dv[:, :T]
