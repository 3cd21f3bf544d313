"""Three-dimensional rotary position embedding and the sinusoidal time embedding, from tables computed in float64.

Each axis (frame, row, column) has its own channels, d of them. Their pair (2i, 2i+1) is rotated by the angle
position · theta^(-2i/d). Of a head's K channels, the first K-2⌊K/3⌋ are rotated by the token's frame, the next ⌊K/3⌋ by
its row and the last ⌊K/3⌋ by its column.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from refalign_jax.config import DiTConfig
from refalign_jax.types import Array, Float, Int

Rotation = tuple[Float[Array, "#B _ 1 K"], Float[Array, "#B _ 1 K"]]
"""Cosine and sine of each channel's angle, which is the same for both channels of a pair."""


@functools.lru_cache(maxsize=8)
def _angles(positions: int, width: int, theta: float) -> np.ndarray:
    """Angles [positions, width] in float64, the same for both channels of a pair."""
    frequencies = theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)
    return np.repeat(np.outer(np.arange(positions, dtype=np.float64), frequencies), 2, axis=-1)


def rotation(frames: Int[Array, "#B F"], rows: int, columns: int, config: DiTConfig) -> Rotation:
    """Cosines and sines for a grid of tokens, frames outermost.

    Args:
      frames: position of each frame; the leading axis is 1 if all samples have the same.
      rows: number of token rows; their positions start at 0.
      columns: number of token columns; their positions start at 0.
      config: gives the widths of the three axes.

    Returns:
      Two float32 arrays [B or 1, F·rows·columns, 1, K].
    """
    time, row, column = (_angles(config.max_position, width, config.rope_theta) for width in config.rope_widths)

    def table(function: np.ufunc) -> Array:
        grid = (*frames.shape, rows, columns)
        parts = (
            jnp.asarray(function(time), jnp.float32)[frames][:, :, None, None],
            jnp.asarray(function(row[:rows]), jnp.float32)[None, None, :, None],
            jnp.asarray(function(column[:columns]), jnp.float32)[None, None, None, :],
        )
        joined = jnp.concatenate([jnp.broadcast_to(part, (*grid, part.shape[-1])) for part in parts], axis=-1)
        return joined.reshape(frames.shape[0], -1, 1, config.head_width)

    return table(np.cos), table(np.sin)


def partner(x: Float[Array, "*batch K"]) -> Float[Array, "*batch K"]:
    """Maps each pair of channels (a, b) to (-b, a), in float32, in the way that is fast on the platform.

    So x·cos + partner(x)·sin rotates each pair to (a·cos - b·sin, b·cos + a·sin).
    """
    roll, product = partner_by_roll, partner_by_product
    rotated: Array = jax.lax.platform_dependent(x, cpu=roll, tpu=product, default=roll)
    return rotated


def partner_by_roll(x: Float[Array, "*batch K"]) -> Float[Array, "*batch K"]:
    """Maps each pair of channels (a, b) to (-b, a), in float32."""
    y = x.astype(jnp.float32)
    even = jnp.arange(x.shape[-1]) % 2 == 0
    return jnp.where(even, -jnp.roll(y, -1, axis=-1), jnp.roll(y, 1, axis=-1))


def partner_by_product(x: Float[Array, "*batch K"]) -> Float[Array, "*batch K"]:
    """The same as a product with a matrix, exact because each column has a single entry, 1 or -1.

    On TPUs, shifting channels by one in the vector unit requires a copy of the array in another layout; the matrix unit
    does it without one.
    """
    K = x.shape[-1]
    swap = np.zeros((K, K), np.float32)
    swap[np.arange(1, K, 2), np.arange(0, K, 2)] = -1
    swap[np.arange(0, K, 2), np.arange(1, K, 2)] = 1
    exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(
        "...k,kj->...j", x, jnp.asarray(swap, x.dtype), precision=exact, preferred_element_type=jnp.float32
    )


def time_sinusoid(t: Float[Array, " B"], width: int) -> Float[Array, "B width"]:
    """The sinusoidal embedding of time: [cos, sin] of t · 10000^(-i/half), i < half = width/2.

    Args:
      t: float32 in [0, 1000].
      width: even.

    Returns:
      The embedding, float32, exact to 2e-7. Angles reach 1,000, where the spacing of float32 is 6e-5. Therefore cosine
      and sine of the integer part of t are looked up in tables computed in float64, and the fraction is added by the
      angle-sum identities.
    """
    half = width // 2
    frequencies = 10000.0 ** (-np.arange(half, dtype=np.float64) / half)
    angles = np.outer(np.arange(1001, dtype=np.float64), frequencies)
    whole = jnp.clip(jnp.floor(t), 0, 1000)
    rest = (t - whole)[:, None] * jnp.asarray(frequencies, jnp.float32)
    index = whole.astype(jnp.int32)
    cos, sin = (jnp.asarray(f(angles), jnp.float32)[index] for f in (np.cos, np.sin))
    return jnp.concatenate(
        [cos * jnp.cos(rest) - sin * jnp.sin(rest), sin * jnp.cos(rest) + cos * jnp.sin(rest)], axis=-1
    )
