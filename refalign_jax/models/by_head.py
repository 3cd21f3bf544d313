"""Attention of the frozen encoders, computed one head at a time.

    out_i = Σ_j e_ij v_j / Σ_j e_ij,   e_ij = exp(s_ij − max_j s_ij),   s_ij = scale · q_i·k_j + bias_ij

The encoders' sequences are short (512 tokens; 1,565 tokens for 480×832 pixels) and they run in float32, which the fused
kernels do not support. Memory does not grow with the number of heads, and the scores of one head fit a CPU's cache,
which those of all heads do not. The samples of a batch are computed together, enough work for an accelerator. The sum
divides the product with v rather than the scores: K divisions per query instead of one per key.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from refalign_jax.models.layers import precision_of
from refalign_jax.types import Array, Float, Int


def attend_by_head(
    q: Float[Array, "B T N K"],
    k: Float[Array, "B T N K"],
    v: Float[Array, "B T N K"],
    scale: float,
    bias: Float[Array, "N T T"] | None = None,
    mask: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N K"]:
    """Attends from every token to all unmasked tokens of its sample.

    Args:
      q: queries.
      k: keys.
      v: values.
      scale: factor of the scores, such as 1/√K.
      bias: added to the scores of each head, float32; None: no bias.
      mask: 1 for tokens to attend to, 0 for padding; None: all are attended to.

    Returns:
      The attended values in q's dtype; scores, softmax and sums are float32.
    """
    precision = precision_of(q.dtype)
    q, k, v = (jnp.moveaxis(x, 2, 0) for x in (q, k, v))

    def one_head(inputs: tuple[Array, Array, Array, Array | None]) -> Array:
        q, k, v, bias = inputs
        scores = scale * jnp.einsum("bik,bjk->bij", q, k, precision=precision, preferred_element_type=jnp.float32)
        if bias is not None:
            scores = scores + bias
        if mask is not None:
            scores = jnp.where(mask[:, None, :] > 0, scores, jnp.finfo(jnp.float32).min)
        weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
        total = jnp.sum(weights, axis=-1, keepdims=True)
        summed = jnp.einsum(
            "bij,bjk->bik", weights.astype(v.dtype), v, precision=precision, preferred_element_type=jnp.float32
        )
        return (summed / total).astype(q.dtype)

    return jnp.moveaxis(jax.lax.map(one_head, (q, k, v, bias)), 0, 2)
